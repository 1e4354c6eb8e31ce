"""Integration tests that are themselves an MPI job: `mpirun -np N python -m pytest tests/mpi`."""
