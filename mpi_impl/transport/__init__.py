"""How arrays of NumPy and CuPy go through MPI, and what watches over it."""
