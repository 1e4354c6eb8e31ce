"""Keras on anything but TensorFlow and PyTorch is refused with a sentence, before it is imported.

JAX is not installed here, so what is tested of it is that the sentence comes first, whether the environment or Keras'
configuration file asks for JAX. Where Keras is imported already it is asked for its backend, which no test covers.
"""

from __future__ import annotations

import json

import pytest

# One rank: refused at import, before ranks know of each other.
pytestmark = [pytest.mark.ranks(1, launcher="gloo"), pytest.mark.time_limit(120)]

SCRIPT = """
import importlib, sys

modules = sys.argv[1:]
for name in modules:
    try:
        importlib.import_module(name)
    except RuntimeError as error:
        print(f"{name}: {error}")
print("imported" if "keras" in sys.modules else "not imported", "jax" in sys.modules)
"""
REFUSED = (
    "Keras runs on {}, which Horovod does not support. Set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch before "
    "Keras is imported."
)


def printed(cluster, modules: list[str], env: dict[str, str]) -> list[str]:
    result = cluster.script(SCRIPT, modules, env={"KERAS_BACKEND": "", **env})
    assert result.exit_code == 0, str(result)
    (out,) = result.stdout
    return [line for line in out.splitlines() if line]


def test_jax_asked_for_by_the_environment(cluster):
    expected = [f"adacons_hvd.keras: {REFUSED.format('jax')}", "not imported False"]
    assert printed(cluster, ["adacons_hvd.keras"], {"KERAS_BACKEND": "jax"}) == expected


def test_jax_asked_for_by_the_configuration(cluster, tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    expected = [f"adacons_hvd.keras: {REFUSED.format('jax')}", "not imported False"]
    assert printed(cluster, ["adacons_hvd.keras"], {"KERAS_HOME": str(tmp_path)}) == expected


def test_tensorflows_module_with_keras_on_torch(cluster):
    (refused, _) = printed(cluster, ["adacons_hvd.tensorflow.keras"], {"KERAS_BACKEND": "torch"})
    assert "Keras runs on torch" in refused
    assert "Import adacons_hvd.keras" in refused
