"""The shape of the package: imports point downward, heavy libraries stay in their one module, and
the public names, the README and the docs say what the code says."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
import types
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bilevel"

# Top to bottom: a module imports only what stands below it. A new module needs a place here.
LEVELS = (
    "__main__",
    "cli",
    "search",
    "recipes",
    "__init__",  # re-exports what stands below; recipes may `import bilevel` as a user does
    "report",
    "sklearn",
    "analysis",
    "testing",  # conformance tables: for tests only
    "train",
    "learners",
    "hypergrad",
    "inner",
    "tasks",
    "nets",
    "linalg",
    "dependence",
    "sharding",
    "problem",
    "errors",
)

# Third-party modules beside jax, numpy and optax, and the only modules that may import them.
HEAVY = {
    "datasets": ("tasks.hugging_face",),
    "grain": ("tasks.prefetch",),
    "matplotlib": ("report", "report.*"),
    "optimistix": ("inner.converged", "recipes.logistic_l2"),
    "optuna": ("search.*", "report.search*"),
    "orbax": ("train.checkpoint",),
    "PIL": ("report", "report.*", "tasks.omniglot*", "tasks.pictures"),
    "ray": ("search.ray_workers",),
    "rich": ("train.display", "search.*"),
    "scipy": ("sklearn.descent", "train.compare"),
    "sklearn": ("sklearn", "sklearn.*", "tasks.newsgroups", "tasks.tabular"),
    "tensorboardX": ("train.metrics",),
    "tyro": ("cli", "search.*"),
}
EVERYWHERE = {"bilevel", "jax", "numpy", "optax"} | sys.stdlib_module_names


def module_name(path: Path) -> str:
    """`train.loop` for src/bilevel/train/loop.py, `train` for its `__init__`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported_names(module: str, path: Path) -> set[tuple[str, int]]:
    """Every (absolute dotted name, line) that a file imports, inside functions too."""
    package = ["bilevel", *path.relative_to(SOURCE).parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {(f"{base}.{alias.name}", node.lineno) for alias in node.names}
    return names


def target(name: str) -> str:
    """The module of the package that the dotted name `bilevel.x.y.Z` is read from."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts) or "__init__"


IMPORTS = [
    (module, name, f"src/bilevel/{path.relative_to(SOURCE).as_posix()}:{line}")
    for module, path in FILES.items()
    for name, line in sorted(imported_names(module, path))
]


def test_every_module_has_a_level():
    unplaced = sorted({module.split(".")[0] for module in FILES} - set(LEVELS))
    assert not unplaced, f"give {unplaced} a place in LEVELS of tests/test_layering.py"


def test_imports_point_downward():
    upward = []
    for module, name, where in IMPORTS:
        if name.split(".")[0] != "bilevel":
            continue
        here, there = module.split(".")[0], target(name).split(".")[0]
        known = here in LEVELS and there in LEVELS
        if here != there and not (known and LEVELS.index(here) < LEVELS.index(there)):
            upward.append(f"{where}: {here} must not import {there} ({name})")
    assert not upward, "\n".join(upward)


def test_imports_have_no_cycle():
    graph = {module: set() for module in FILES}
    for module, name, _ in IMPORTS:
        if name.split(".")[0] == "bilevel":
            graph[module].add(target(name))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_nothing_but_tests_imports_testing():
    users = [
        where
        for module, name, where in IMPORTS
        if name.startswith("bilevel.")
        and target(name).split(".")[0] == "testing"
        and module.split(".")[0] != "testing"
    ]
    assert not users, f"bilevel.testing is for tests only, imported at {users}"


def test_libraries_stay_in_their_module():
    strays = []
    for module, name, where in IMPORTS:
        library = name.split(".")[0]
        allowed = HEAVY.get(library, ())
        if library not in EVERYWHERE and not any(fnmatch(module, place) for place in allowed):
            strays.append(f"{where}: {library} may be imported only in {list(allowed)}")
    assert not strays, "\n".join(strays)


def test_import_bilevel_is_light():
    code = "import json, sys, bilevel; print(json.dumps([n for n in sys.modules if '.' not in n]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = sorted(set(HEAVY) & set(json.loads(done.stdout.splitlines()[-1])))
    assert not loaded, f"`import bilevel` loads {loaded}: import them where they are used"


def test_public_names_are_all():
    bilevel = importlib.import_module("bilevel")
    names = list(bilevel.__all__)
    assert names == sorted(set(names)), "__all__ must be sorted, each name once"
    # A submodule becomes an attribute by being imported; it is public only if __all__ says so.
    bound = {
        name
        for name, value in vars(bilevel).items()
        if not name.startswith("_")
        and not (isinstance(value, types.ModuleType) and value.__name__.startswith("bilevel."))
    }
    missing = sorted(set(names) - set(vars(bilevel)))
    assert not missing, f"__all__ names what bilevel does not have: {missing}"
    unlisted = sorted(bound - set(names))
    assert not unlisted, f"public but not in __all__ (list it, or start it with _): {unlisted}"


def test_public_things_have_a_docstring():
    bilevel = importlib.import_module("bilevel")
    bare = []
    for name in bilevel.__all__:
        value = getattr(bilevel, name)
        if not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value)):
            continue
        doc = value.__doc__ or ""
        # NamedTuple and dataclass write one of their own: "Task(support, query)".
        if not doc.strip() or doc.startswith(f"{name}("):
            bare.append(name)
    assert not bare, f"public names without a docstring: {bare}"


def test_version_is_the_one_of_pyproject():
    bilevel = importlib.import_module("bilevel")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert bilevel.__version__ == declared["version"], "run `make venv` after a change of version"


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8")


def tree_entries(block: str) -> set[str]:
    """The names one level below `src/bilevel/` in a drawn tree, without their captions."""
    lines = [re.sub("[│├└─]", " ", line) for line in block.splitlines()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    start = next(i for i, line in enumerate(lines) if line.strip().startswith("src/bilevel/"))
    below = []
    for indent, line in zip(indents[start + 1 :], lines[start + 1 :], strict=True):
        if line.strip() and indent <= indents[start]:
            break
        if line.strip():
            below.append((indent, line.split()[0].rstrip("/")))
    return {name for indent, name in below if indent == min(indent for indent, _ in below)}


def test_readme_tree_is_the_package():
    blocks = re.findall(r"^```text\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)
    trees = [b for b in blocks if re.search(r"^[\s│├└─]*src/bilevel/", b, flags=re.MULTILINE)]
    assert len(trees) == 1, (
        f"README.md must have one ```text block with a line src/bilevel/, got {len(trees)}"
    )
    drawn = tree_entries(trees[0])
    present = {path.name for path in SOURCE.iterdir()} - {"__pycache__", "py.typed"}
    assert drawn == present, (
        f"only in README.md: {sorted(drawn - present)}, not in it: {sorted(present - drawn)}"
    )


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme(), flags=re.DOTALL))
    named = set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", code, flags=re.MULTILINE))
    assert named <= targets, f"README.md names make targets that do not exist: {named - targets}"


def test_links_between_documents_resolve():
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s#]+)", path.read_text(encoding="utf-8")):
            if "://" not in link and not (path.parent / link).exists():
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def test_tests_named_in_documents_exist():
    missing = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for file, name in re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", path.read_text(encoding="utf-8")):
            there = ROOT / file
            if not there.exists() or (name and f"def {name}(" not in there.read_text(encoding="utf-8")):
                missing.append(f"{path.relative_to(ROOT)}: {file}::{name}")
    assert not missing, "\n".join(missing)
