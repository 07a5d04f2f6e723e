"""Planning: which models there are, what a schedule costs on them, and pictures of it.

No algorithm file imports this package.
"""

from lvxattn.reference.plan.problems import MODELS, Model

__all__ = ["MODELS", "Model"]
