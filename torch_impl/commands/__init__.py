"""The commands of ``torchrun -m lvxattn.torch_impl``."""
