"""MAML++ on few-shot classification (Antoniou, Edwards, Storkey, 2019)."""

from dataclasses import dataclass, field
from typing import Literal

import optax

import bilevel as bl
from bilevel.learners.maml import rate_figures
from bilevel.learners.maml_plus_plus import maml_plus_plus
from bilevel.nets.norms import SupportNorm
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData
from bilevel.tasks.with_support import with_support


@dataclass(frozen=True)
class MamlPlusPlus:
    """Learn an initialization with MAML's problems mended: rates, norms and losses for each inner step."""

    num_meta_steps: int = 10_000
    """Outer steps; the paper's are 75 000."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 5
    """Inner steps in training, K."""
    rate: float = 0.1
    """Where the learned inner rates start, one for each layer and step."""
    learned_rates: bool = True
    """Whether the inner rates are learned."""
    per_step_norm: bool = True
    """Whether scale and bias of the batch norm are learned for each step, and not adapted."""
    multi_step: float = 0.07
    """Share of the outer steps in which the loss after every inner step counts; 0 for none of them."""
    first_order: float = 0.33
    """Share of the outer steps, the first ones, without second derivatives."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    weight_decay: float = 0.0
    """Of the initialization, against meta-overfitting (AdamW)."""
    filters: int = 64
    """Width of conv4."""
    downsample: Literal["stride", "pool"] = "stride"
    """How conv4 halves pictures; the paper pools, which takes several times as long."""
    norm: Literal["batch", "support", "group", "layer"] = "batch"
    """On the current batch (transductive), on the support alone, or on each example by itself."""
    dropout: float = 0.0
    """Share of the features dropped in the outer loss, against meta-overfitting."""
    task: FewShotData = field(default_factory=lambda: FewShotData(num_tasks=8, eval_queries=1))
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        task = self.task
        support = self.norm == "support"
        net = bl.nets.conv4(
            task.ways,
            self.filters,
            image_shape=task.image_shape,
            downsample=self.downsample,
            norm=SupportNorm(task.ways * task.shots) if support else self.norm,
            dropout=self.dropout,
        )
        loss = bl.learners.cross_entropy
        learner = maml_plus_plus(
            net,
            loss,
            num_steps=self.num_steps,
            rate=self.rate,
            learned_rates=self.learned_rates,
            per_step_norm=self.per_step_norm,
            multi_step_annealing=round(self.multi_step * self.num_meta_steps) or None,
            first_order_steps=round(self.first_order * self.num_meta_steps),
        )
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)
        more = {}
        if support:
            validation = task.validation()
            more = {
                "sample_tasks": bl.tasks.batch(with_support(task.sampler("train")), task.num_tasks),
                "sample_test": with_support(task.sampler("test", queries=task.eval_queries)),
                "sample_validation": None if validation is None else with_support(validation),
                "pictures": "none",
            }
        return task.experiment(
            learner,
            optax.adamw(schedule, weight_decay=self.weight_decay, mask=_initialization),
            eval_steps=self.num_steps,
            statistics={
                "batch": "transductive batch norm",
                "support": "batch norm on the support alone",
                "group": "group norm",
                "layer": "layer norm",
            }[self.norm],
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
            meta_figures=rate_figures,
            **more,
        )


def _initialization(meta):
    """Rates and norms are not to be pulled to zero."""
    return {name: name == "init" for name in meta}
