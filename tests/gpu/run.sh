#!/usr/bin/env bash
# `make gpu-test`: the tests and the benchmarks that need a GPU, on a machine that has one, in a few minutes.
#
#   PYTHON=python3            the Python whose PyTorch sees the GPU
#   GPU_WHEELS=dir            where that machine reaches no registry: wheels of what its Python lacks, carried along.
#                             Each folder in there holds one Horovod, and the tests run with each: dir/nccl/*.whl, built
#                             with --nccl, and dir/staged/*.whl, built for CUDA without GPU operations
#   OUT=out/gpu               where logs and figures go
#   GPU_TEST_DEVICE=cpu       runs the same lines without a GPU, to try them
#   GPU_BENCH_ARGS=--quick    passed on to the benchmarks
#   GPU_STAGES='NAME ...'     only these of: arithmetic ddp-gloo horovod-staged benchmarks ddp-nccl horovod-nccl
#   GPU_TEST_SELECT=EXPR      only these of the tests that start ranks, as pytest's -k
#
# Without GPU_WHEELS what is missing is installed into out/gpu, Horovod compiled among it; nothing is installed into the
# Python that is used.
set -uo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
device=${GPU_TEST_DEVICE:-cuda}
out=${OUT:-out/gpu}
mkdir -p "$out" out/gpu
site=$PWD/out/gpu/site
export GPU_TEST_DEVICE=$device PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
# Variables of another job would send ranks elsewhere.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT

die() { printf '%s\n' "$*" >&2; exit 1; }
# Whether a package can be imported; PyYAML's module has another name.
has() { "$python" -c "import $(sed 's/^pyyaml$/yaml/I' <<<"$1")" 2>/dev/null; }
install() { "$python" -m pip install -q --no-deps --no-compile --disable-pip-version-check --upgrade --target "$@"; }

"$python" - "$device" <<'END' || die "These tests need a PyTorch that sees a GPU. Name the Python that has one: make gpu-test PYTHON=/path/to/python3"
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable}: {error}")
gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name() if gpu else "no GPU"
print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {name}")
sys.exit(not gpu and sys.argv[1] == "cuda")
END
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

# --- what is missing ---------------------------------------------------------------------------------------------------
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
horovods=()
if [ -n "${GPU_WHEELS:-}" ]; then
    for wheel in "$GPU_WHEELS"/*.whl; do
        case ${wheel##*/} in
            horovod-* | '*.whl') ;;
            *) name=${wheel##*/}; has "${name%%-*}" || install "$site" --no-index "$wheel" ;;
        esac
    done
    for folder in "$GPU_WHEELS"/*/; do
        kind=$(basename "$folder")
        compgen -G "$folder*.whl" >/dev/null || continue
        install "$PWD/out/gpu/$kind" --no-index "$folder"*.whl && horovods+=("$kind")
    done
else
    for package in pytest iniconfig pluggy packaging cloudpickle psutil PyYAML numpy; do
        has "$package" || install "$site" "$package"
    done
    if ! has horovod && [ "$device" = cuda ]; then
        mpi=(); command -v mpirun >/dev/null || mpi=(--gloo-only)
        "$python" -m adacons_hvd.horovod_build --frameworks torch --nccl "${mpi[@]}" --wheel-dir out/gpu/wheels &&
            install "$PWD/out/gpu/nccl" --no-index out/gpu/wheels/*.whl && horovods+=(nccl)
    fi
fi
[ ${#horovods[@]} -gt 0 ] || horovods=(installed)
has pytest || die "There is no pytest: add its wheel, iniconfig's and pluggy's to GPU_WHEELS."

# Whether a stage was asked for.
asked() { [[ " ${GPU_STAGES:-$1} " == *" $1 "* ]]; }
# pytest's -k for tests that start ranks.
some() { [ -n "${GPU_TEST_SELECT:-}" ] && echo "($1) and ($GPU_TEST_SELECT)" || echo "$1"; }

# --- tests and benchmarks -----------------------------------------------------------------------------------------------
failed=()
stages=()
tests() { # NAME FOLDER ARGUMENTS...: Horovod is the one in that folder
    local name=$1 folder=$2
    shift 2
    PYTHONPATH=$PWD/out/gpu/$folder:$PYTHONPATH timeout --kill-after 10 "${GPU_TEST_LIMIT:-120}" "$python" -m pytest \
        -v --tb=short -rfEsX --color=no -p no:cacheprovider "$@" >"$out/$name.log" 2>&1
}
finished() { # NAME STATUS
    stages+=("$1")
    [ "$2" = 0 ] || failed+=("$1")
    echo "$1: $(grep -c ' PASSED' "$out/$1.log") passed, after $SECONDS s"
}
alone() { tests "$@"; finished "$1" $?; }

# What does not go through NCCL, side by side.
declare -A running
if asked arithmetic; then
    tests arithmetic installed tests/gpu/test_gpu_arithmetic.py tests/gpu/test_gpu_kernels.py tests/gpu/test_waiting.py &
    running[arithmetic]=$!
fi
if asked ddp-gloo; then
    tests ddp-gloo installed -k "$(some 'not nccl')" tests/gpu/test_gpu_ddp.py & running[ddp-gloo]=$!
fi
for kind in "${horovods[@]}"; do
    [ "$kind" = staged ] && asked horovod-staged || continue
    tests horovod-staged staged -k "$(some gpu)" tests/gpu/test_gpu_horovod.py & running[horovod-staged]=$!
done
for name in "${!running[@]}"; do
    wait "${running[$name]}"
    finished "$name" $?
done

# Alone, because they are timed.
staged=()
[ -d out/gpu/staged ] && [ -n "${running[horovod-staged]:-}" ] && staged=(--staged "$PWD/out/gpu/staged")
if asked benchmarks; then
    # shellcheck disable=SC2086 # several arguments
    PYTHONPATH=$PWD/out/gpu/${horovods[0]}:$PYTHONPATH timeout --kill-after 10 "${GPU_BENCH_LIMIT:-150}" \
        "$python" -m benchmarks.gpu --device "$device" "${staged[@]}" --out "$out/results.json" ${GPU_BENCH_ARGS:-} \
        >"$out/benchmarks.log" 2>&1 || failed+=(benchmarks)
    echo "benchmarks: after $SECONDS s"
fi

# One after the other, because NCCL's kernels keep the GPU busy while they wait for another rank.
[ "$device" = cpu ] || ! asked ddp-nccl || alone ddp-nccl installed -k "$(some nccl)" tests/gpu/test_gpu_ddp.py
for kind in "${horovods[@]}"; do
    [ "$kind" = staged ] || ! asked "horovod-$kind" ||
        alone "horovod-$kind" "$kind" -k "$(some gpu)" tests/gpu/test_gpu_horovod.py
done

# --- the report -----------------------------------------------------------------------------------------------------------
for name in "${stages[@]}"; do
    printf '\n== %s\n' "$name"
    grep -E '^(FAILED|ERROR|SKIPPED|XPASS|E  )|^[=]+ .*(passed|failed|error|skipped|no tests)' "$out/$name.log" | cut -c1-300 | head -n 40
    grep -qE '(passed|failed|error|skipped)' "$out/$name.log" || tail -n 15 "$out/$name.log"
done
if asked benchmarks; then
    printf '\n== benchmarks (all of them in %s)\n' "$out/results.json"
    "$python" -m benchmarks.gpu --show "$out/results.json" || tail -n 15 "$out/benchmarks.log"
fi
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED: %s; see the logs in %s\n' "${failed[*]}" "$out"
    exit 1
fi
printf '\nall passed; logs are in %s\n' "$out"
