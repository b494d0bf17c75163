"""What the standard library raises, gathered where it takes several names to say one thing."""

import zipfile
import zlib

# What reading a damaged zip file raises, .npz among them, beside OSError and ValueError.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError)
