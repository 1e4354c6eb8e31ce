"""Break one feature at a time and see a test fail: what the suite holds, and that it does.

    python tests/mutations.py                 every feature below, a line each; an hour of two cores
    python tests/mutations.py NAME ...        some of them
    python tests/mutations.py --list

A mutation replaces some text in one file of the package, in a copy of the checkout. The named tests must then fail.
Before tests are removed or merged, and after, the list shows that what was removed was held by others.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400.0


@dataclass(frozen=True)
class Mutation:
    """One feature: where it is, what breaks it, and the tests of which one has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # --- the method ---
    Mutation(
        "the momentum's inverse permutation",
        "aggregators/adacons.py",
        "smoothed = beta * _read_at(m, rank)",
        "smoothed = beta * m",
        "tests/test_aggregators.py",
    ),
    Mutation(
        "no weight for a gradient of zero",
        "aggregators/adacons.py",
        "gamma = ops.where(alive, alpha / n_or_1, zero)",
        "gamma = alpha / n_or_1",
        "tests/test_aggregators.py",
    ),
    Mutation(
        "the average where coefficients cancel",
        "aggregators/adacons.py",
        "fallback = silent | (whole <=",
        "fallback = silent | (whole <= -1e9 +",
        "tests/test_aggregators.py",
    ),
    Mutation(
        "a step that is not finite leaves no memory",
        "aggregators/base.py",
        "ops.where(usable, new, own[k])",
        "new",
        "tests/test_aggregators.py",
    ),
    Mutation(
        "the past's weights in curvature",
        "aggregators/curvature.py",
        "w[..., workers:] * scale",
        "w[..., workers:]",
        "tests/test_aggregators.py",
    ),
    # --- moving gradients ---
    Mutation(
        "a shard's own segments",
        "schedules/one_pass.py",
        "return self.collectives.rank * shard, (self.collectives.rank + 1) * shard",
        "return 0, shard",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "whoever reads others' memory waits for them",
        "collectives/shared.py",
        "if min(self._counts.tolist()) < self._sent:",
        "if False:",
        "tests/pytorch/test_torch_memory.py",
    ),
    Mutation(
        "the weight of a rank that has joined",
        "schedules/step.py",
        "read(message[-workers:]) > 0",
        "read(message[-workers:]) >= 0",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "an excluded worker's gradient counts as zeros",
        "schedules/step.py",
        "bucket.blank_unless(finite)",
        "pass",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "gradients that are refused",
        "schedules/step.py",
        'if self.aggregator.nonfinite == "raise"',
        "if False",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "past gradients under a loss scale",
        "schedules/step.py",
        "decision.past_weights / unscale",
        "decision.past_weights",
        "tests/pytorch/test_torch_history.py -k loss_scale",
    ),
    Mutation(
        "a rank that is stopped is given up by those who wait for it in memory",
        "collectives/direct.py",
        "if self.watched is not None and self.watched.done():",
        "if False:",
        "tests/faults/test_faults.py::test_a_rank_that_stays_stopped_ends_the_job_within_gloos_timeout",
    ),
    # --- the engine ---
    Mutation(
        "a gradient that changed after it was sent",
        "engine/protocol.py",
        "Verdict.RESEND if any(message.changed for message in messages) else Verdict.PROCEED",
        "Verdict.PROCEED",
        "tests/engine/test_protocol.py",
    ),
    Mutation(
        "one loss for a line search",
        "engine/protocol.py",
        "sum(losses) / len(losses)",
        "losses[0]",
        "tests/engine/test_protocol.py",
    ),
    Mutation(
        "resizing the momentum",
        "engine/memory.py",
        "self.memory = aggregator.resized(self.memory, workers)",
        "self.memory = {}",
        "tests/conformance/test_conformance.py -k 'ddp or fsdp'",
    ),
    Mutation(
        "a memory that is damaged is refused",
        "aggregators/checkpoint.py",
        "if not all(map(math.isfinite, _flat(value))):",
        "if False:",
        "tests/conformance/test_conformance.py -k 'ddp or fsdp'",
    ),
    Mutation(
        "an optimizer's own state is kept where its memory is refused",
        "torch/optimizer.py",
        "unpack_memory(ours)  # refuses",
        "pass  # refuses",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "resharding the history",
        "engine/history.py",
        "shares = divide(held, self._size)",
        "shares = None",
        "tests/pytorch/test_torch_history.py",
    ),
    Mutation(
        "an error names the ranks that have drifted",
        "engine/replicas.py",
        "before step {step} {by_ranks(others)} held",
        "before step {step} some ranks held",
        "tests/engine/test_protocol.py -k named",
    ),
    Mutation(
        "replicas are compared",
        "engine/replicas.py",
        "return interval > 0 and step > 0",
        "return False and step > 0",
        "tests/conformance/test_conformance.py -k ddp",
    ),
    Mutation(
        "an error tells where settings differ",
        "engine/session.py",
        '"bucket_bytes": settings.bucket_bytes',
        '"bucket_bytes": 0',
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    # --- PyTorch over Horovod ---
    Mutation(
        "parameters that may differ",
        "torch/reducer.py",
        " if id(slot.parameter) not in differing]",
        "]",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "ranks that have joined are not compared",
        "torch/reducer.py",
        "{rank: table[rank].tolist() for rank in present}",
        "{rank: row.tolist() for rank, row in enumerate(table)}",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "a step that a scheduler has bound",
        "torch/optimizer.py",
        "for name in _CALLS_BASE if name in vars(optimizer)",
        "for name in () if name in vars(optimizer)",
        "tests/pytorch/test_torch_scripts.py tests/pytorch/test_torch_optimizer.py -k scheduler",
    ),
    Mutation(
        "a loss scale that the scaler tells",
        "torch/optimizer.py",
        "reducer.synchronize(1.0 if given is not None else unscale(",
        "reducer.synchronize(1.0 if True else unscale(",
        "tests/pytorch/test_torch_scripts.py -k amp",
    ),
    Mutation(
        "a step around the distributed optimizer",
        "torch/optimizer.py",
        "if distributed._may_step or not distributed._should_synchronize:",
        "if True:",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "a layer that is frozen or not any more",
        "torch/reducer.py",
        "return len(trainable) == len(self._slots) and all(p in self._slots for p in trainable)",
        "return bool(self._slots)",
        "tests/pytorch/test_torch_gradients.py -k 'frozen or toggled or added'",
    ),
    Mutation(
        "gradients leave while backward runs",
        "torch/reducer.py",
        "if slot.additions == slot.expected:",
        "if False:",
        "tests/pytorch/test_torch_gradients.py -k leaves",
    ),
    Mutation(
        "all remember what the rank with most steps does",
        "engine/memory.py",
        "    leader = rank_to_follow(remembered)\n    if leader is None:",
        "    leader = rank_to_follow(remembered)\n    if True:",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "half precision on the wire",
        "torch/packing.py",
        "return torch.float16, None",
        "return None, None",
        "tests/pytorch/test_torch_arguments.py -k fp16",
    ),
    Mutation(
        "the conjugate of a complex gradient in PyTorch",
        "torch/packing.py",
        "views.append(view)\n            gradients.append(real(gradient))",
        "views.append(view)\n            gradients.append(real(gradient.conj().resolve_conj()))",
        "tests/conformance/test_conformance.py -k 'pytorch and gloo'",
    ),
    Mutation(
        "optimizers are numbered afresh with Horovod",
        "torch/reducer.py",
        "if self._generation != numbering.generation:",
        "if False:",
        "tests/pytorch/test_torch_elastic.py -k numbered",
    ),
    # --- elastic jobs ---
    Mutation(
        "the momentum is read at another number of workers",
        "aggregators/adacons.py",
        'return {**memory, "curve": resample(memory["curve"], workers)}',
        'return {**memory, "curve": resample(0 * memory["curve"], workers)}',
        "tests/conformance/test_elastic.py -k pytorch",
    ),
    Mutation(
        "a commit has the whole history in PyTorch",
        "torch/elastic.py",
        'getattr(self.value, "gather_history", lambda: None)()',
        "pass",
        "tests/conformance/test_elastic.py -k pytorch",
    ),
    Mutation(
        "a commit has the whole history of tapes",
        "engine/elastic.py",
        "memory.gather_history()",
        "pass",
        "tests/conformance/test_elastic.py -k tapes",
    ),
    Mutation(
        "each commit has what was learnt until then",
        "engine/elastic.py",
        "self._states = [memory.state_dict() for memory in self._memories()]",
        'self._states = getattr(self, "_states", None) or [memory.state_dict() for memory in self._memories()]',
        "tests/conformance/test_elastic.py -k 'test_keras and not torch'",
    ),
    Mutation(
        "newcomers are told what is remembered",
        "engine/elastic.py",
        "share_memories(library, self._memories(), 0)",
        "pass",
        "tests/conformance/test_elastic.py",
    ),
    Mutation(
        "a newcomer that leads goes on from what it was given",
        "torch/elastic.py",
        "        super().sync()\n        self.save()",
        "        super().sync()",
        "tests/pytorch/test_torch_elastic.py -k newcomer",
    ),
    # --- DDP and FSDP ---
    Mutation(
        "memories are repaired in DDP",
        "ddp/reducer.py",
        "if found.memories_differ or self._share:",
        "if False:",
        "tests/ddp/test_ddp_guards.py -k state",
    ),
    Mutation(
        "a loss scale in DDP",
        "ddp/reducer.py",
        "factor = unscale(self.settings.grad_scaler, reference)",
        "factor = 1.0",
        "tests/ddp/test_ddp_features.py -k scale",
    ),
    Mutation(
        "a rank without data under DDP's join",
        "ddp/reducer.py",
        "        return _in_backward()\n\n    # --- steps",
        "        return True\n\n    # --- steps",
        "tests/ddp/test_ddp_features.py -k run_out",
    ),
    Mutation(
        "a step along gradients under no_sync",
        "ddp/reducer.py",
        "if self._stray:",
        "if False:",
        "tests/conformance/test_conformance.py -k ddp",
    ),
    Mutation(
        "ranks without data are not compared under DDP's join",
        "ddp/reducer.py",
        "self._replicas.compare(self._here() is not False, self._steps + 1)",
        "self._replicas.compare(True, self._steps + 1)",
        "tests/conformance/test_conformance.py -k ddp",
    ),
    Mutation(
        "a step along gradients that were refused in FSDP",
        "fsdp/reducer.py",
        "        if self._refused:\n            raise",
        "        if False:\n            raise",
        "tests/conformance/test_conformance.py -k fsdp",
    ),
    Mutation(
        "a loss scale in FSDP",
        "fsdp/reducer.py",
        "factor = unscale(self.settings.grad_scaler, gradient)",
        "factor = 1.0",
        "tests/fsdp/test_fsdp_features.py -k scale",
    ),
    # --- tapes ---
    Mutation(
        "a tape's cache key has its settings",
        "tensorflow/tape.py",
        "key = (name, settings, tuple(",
        "key = (name, None, tuple(",
        "tests/tensorflow/test_tf_arguments.py -k share_a_reducer",
    ),
    Mutation(
        "a constant gradient is not evaluated beforehand",
        "collectives/horovod_tensorflow.py",
        "        if not tensor.shape.rank:\n            return tensor\n",
        "        return tensor\n",
        "tests/tensorflow/test_tf_gradients.py -k constant",
    ),
    Mutation(
        "what nobody has a use for is received all the same",
        "collectives/horovod_tensorflow.py",
        "if not self._received or tensor.shape.rank != 1:",
        "if True:",
        "tests/tensorflow/test_tf_tape.py -k padding",
    ),
    Mutation(
        "rows that are there twice",
        "tensorflow/packing.py",
        "once, places = distinct(rows)",
        "once, places = rows, tf.range(tf.size(rows))",
        "tests/conformance/test_conformance.py -k 'tapes and gloo'",
    ),
    Mutation(
        "the conjugate of a complex gradient in a tape",
        "tensorflow/packing.py",
        "tf.stack([tf.math.real(gradient), tf.math.imag(gradient)], -1)",
        "tf.stack([tf.math.real(gradient), -tf.math.imag(gradient)], -1)",
        "tests/conformance/test_conformance.py -k 'tapes and gloo'",
    ),
    Mutation(
        "a tape's memory is everyone's",
        "tensorflow/memory.py",
        "tf.cond(differ, share, lambda: flat)",
        "flat",
        "tests/conformance/test_conformance.py -k tapes",
    ),
    Mutation(
        "a step in a graph is counted",
        "tensorflow/reducer.py",
        "layout.count.assign(count + 1)",
        "layout.count.assign(count)",
        "tests/tensorflow/test_tf_replicas.py",
    ),
    Mutation(
        "a rank that changes what it trains",
        "tensorflow/flags.py",
        "flags.layout == layout.digest)",
        "flags.layout == flags.layout)",
        "tests/tensorflow/test_tf_agreement.py tests/keras/test_keras_training.py -k 'freeze or change or later'",
    ),
    Mutation(
        "a graph compares in the second step",
        "tensorflow/reducer.py",
        "(count == 1) | (count % interval == 0)",
        "(count % interval == 0)",
        "tests/tensorflow/test_tf_replicas.py -k 'layout and graph'",
    ),
    Mutation(
        "a graph compares as often as it was told to",
        "tensorflow/reducer.py",
        "(count == 1) | (count % interval == 0)",
        "(count == 1)",
        "tests/conformance/test_conformance.py -k tapes",
    ),
    Mutation(
        "a rank that is back compares when the others do",
        "tensorflow/flags.py",
        "differ = together & ",
        "differ = ",
        "tests/conformance/test_conformance.py -k tapes",
    ),
    # --- Keras ---
    Mutation(
        "gradients that are said to be aggregated",
        "keras/legacy.py",
        "        elif told:\n",
        "        elif False:\n",
        "tests/conformance/test_conformance.py -k keras_2",
    ),
    Mutation(
        "a step around Keras' distributed optimizer",
        "keras/binding.py",
        "if not hvd.is_initialized() or hvd.size() == 1:",
        "if True:",
        "tests/conformance/test_conformance.py -k keras_2",
    ),
    Mutation(
        "gradients of several passes in Keras",
        "keras/binding.py",
        "[g if g is None else g / self.passes for g in sums] if self.average_passes else sums",
        "sums",
        "tests/keras/test_keras_training.py tests/keras/test_keras_oracle.py",
    ),
    Mutation(
        "sums that an error has met begin anew",
        "keras/tensorflow_backend.py",
        "apply(self._take(sums))",
        "apply(_values(sums))\n            self._take(sums)",
        "tests/conformance/test_conformance.py -k 'test_keras and gloo-3-tensorflow'",
    ),
    Mutation(
        "a local variable's share in Keras",
        "keras/binding.py",
        "return self.backend.key_of(variable) in self.local",
        "return False",
        "tests/keras/test_keras_training.py -k local",
    ),
]


def broken_copy(mutation: Mutation, folder: Path) -> None:
    """A copy of the checkout with the mutation in it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    file = folder / "adacons_hvd" / mutation.file
    text = file.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def caught_by(mutation: Mutation) -> str:
    """The test that fails first, or an empty text."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        broken_copy(mutation, Path(name))
        # As a shell would split it.
        words = [quoted or plain for quoted, plain in re.findall(r"'([^']*)'|(\S+)", mutation.tests)]
        done = subprocess.run(
            ["env", f"PYTHONPATH={name}", sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", *words],
            cwd=name,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    if done.returncode not in (0, 1):
        print(done.stdout, done.stderr)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts of names; all if there are none")
    parser.add_argument("--list", action="store_true", help="only list them")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if not arguments.names or any(name in m.name for name in arguments.names)]
    missed = 0
    for mutation in chosen:
        if arguments.list:
            print(f"{mutation.name}: {mutation.file}")
            continue
        started = time.monotonic()
        test = caught_by(mutation)
        missed += not test
        print(f"{mutation.name}: {test or 'NOTHING FAILS'} ({time.monotonic() - started:.0f} s)", flush=True)
    if missed or not chosen:
        sys.exit(f"{missed} of {len(chosen)} mutations are not noticed")


if __name__ == "__main__":
    main()
