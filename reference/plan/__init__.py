"""Planning: which models there are, what a schedule costs on them, and pictures of it.

No algorithm file imports this package.
"""

from lvxattn.reference.plan.choose import Candidate, candidates
from lvxattn.reference.plan.machine import MACHINES, Link, Machine
from lvxattn.reference.plan.memory import Memory, memory, most_frames
from lvxattn.reference.plan.problem import planned
from lvxattn.reference.plan.problems import MODELS, Model
from lvxattn.reference.plan.simulate import Played, play
from lvxattn.reference.plan.steps import messages, steps

__all__ = [
    "MACHINES",
    "MODELS",
    "Candidate",
    "Link",
    "Machine",
    "Memory",
    "Model",
    "Played",
    "candidates",
    "memory",
    "messages",
    "most_frames",
    "planned",
    "play",
    "steps",
]
