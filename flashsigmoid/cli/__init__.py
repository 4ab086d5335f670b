"""The commands of `flashsigmoid`: words from a terminal to calls of the rooms, imported when needed.

No training, no measuring and no drawing happens here; exit codes and errors are __main__'s.
"""

# isort: off
# in the order in which --help lists their commands
from . import demo as demo
from . import train as train
from . import pair as pair
from . import language as language
from . import speech as speech
from . import report as report
from . import study as study
from . import pack as pack
from . import explain as explain
from . import bench as bench
from . import steps as steps
from .root import app as app
