"""Planning: which models there are, what a schedule costs on them, and pictures of it.

No algorithm file imports this package.
"""

from lvxattn.plan.choose import Candidate, candidates, explain
from lvxattn.plan.machine import MACHINES, Link, Machine
from lvxattn.plan.memory import Memory, memory, most_frames
from lvxattn.plan.problem import planned
from lvxattn.plan.problems import MODELS, Model
from lvxattn.plan.simulate import Played, play
from lvxattn.plan.steps import messages, steps

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
    "explain",
    "memory",
    "messages",
    "most_frames",
    "planned",
    "play",
    "steps",
]
