"""What AdaCons costs beside averaging, measured: ``python -m benchmarks --help``."""
