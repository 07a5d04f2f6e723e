"""Plan a run: model and machine presets, the messages, time and memory of each schedule.

The front doors choose a schedule by it for ``schedule="auto"``; no other algorithm file imports it.
"""

from lvxattn.plan.bound import lower_bound
from lvxattn.plan.choose import Candidate, candidates, explain
from lvxattn.plan.machine import MACHINES, Link, Machine
from lvxattn.plan.memory import Memory, call_memory, memory, most_frames
from lvxattn.plan.models import MODELS, PROBLEMS, Model, Problem, planned
from lvxattn.plan.simulate import Played, play
from lvxattn.plan.steps import messages, steps
from lvxattn.plan.whole import WHOLE, Whole

__all__ = [
    "MACHINES",
    "MODELS",
    "PROBLEMS",
    "WHOLE",
    "Candidate",
    "Link",
    "Machine",
    "Memory",
    "Model",
    "Played",
    "Problem",
    "Whole",
    "call_memory",
    "candidates",
    "explain",
    "lower_bound",
    "memory",
    "messages",
    "most_frames",
    "planned",
    "play",
    "steps",
]
