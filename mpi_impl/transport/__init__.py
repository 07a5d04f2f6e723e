"""Sending NumPy's and CuPy's arrays over MPI, with a watchdog and reports of lost ranks."""
