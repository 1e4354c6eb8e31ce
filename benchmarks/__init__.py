"""The benchmarks measure what AdaCons costs beside averaging: ``python -m benchmarks --help``."""
