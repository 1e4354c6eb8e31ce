"""The work on the host that every binding does, written once and without a framework.

``settings`` checks arguments, ``replicas`` notices ranks that train alone. An engine module knows neither optimizers
nor tensors: a binding hands it numbers, names and values, and gets back a decision or an error.
"""
