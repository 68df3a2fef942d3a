#!/usr/bin/env bash
# On a machine with a GPU and no network: install from a folder of wheels (`make wheelhouse`), then
# test and measure, within 8 minutes. Run it in a clone of this project:
#
#     tools/gpu_check.sh FOLDER_OF_WHEELS RESULTS [STEP...]
#
# Its environment sees the packages of the Python that it is started with ($PYTHON, or python3),
# which has PyTorch; nothing is written outside RESULTS. Each step has a time limit and leaves
# RESULTS/STEP.log and .json, also if an earlier one failed; without names, all of them run. Without
# a GPU the CPU is measured, with smaller images. Exit status 1 if a step failed.
set -uo pipefail

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
wheels=$1 results=$2
shift 2
compgen -G "$wheels/*.whl" >/dev/null || { echo >&2 "gpu_check: no wheels in $wheels: make wheelhouse"; exit 2; }
mkdir -p "$results" || exit 2
wheels=$(cd "$wheels" && pwd) results=$(cd "$results" && pwd)
cd "$(dirname "$0")/.." || exit 2
steps="$*"
minutes=${MINUTES:-8}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=$results/environment
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # this checkout, before its wheel

# An environment on top of the machine's packages, which may themselves be in an environment.
machine=${PYTHON:-python3}
environment=$results/environment
python=$environment/bin/python
rm -rf "$environment"
"$machine" -m venv --without-pip "$environment" &&
    "$machine" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth" &&
    "$machine" -m pip --python "$python" install --quiet --disable-pip-version-check --no-index \
        --no-deps --no-compile "$wheels"/*.whl >"$results/install.log" 2>&1 ||
    { cat "$results/install.log"; echo >&2 "gpu_check: the wheels cannot be installed"; exit 1; }
"$python" - <<'END' || exit 1
import sys
try:
    import cv2, detectron2, torch, torchvision
except ImportError as error:
    sys.exit(f"gpu_check: {error}: make wheelhouse with HAVE naming only what this machine has")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {gpu}")
END

failed=0
step() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS status said
    shift 2
    [ -z "$steps" ] || [[ " $steps " == *" $name "* ]] || return 0
    [ $((minutes * 60 - SECONDS)) -ge "$seconds" ] || seconds=$((minutes * 60 - SECONDS))
    [ "$seconds" -gt 5 ] || { printf '%-28s no time left\n' "$name" | tee -a "$results/steps.txt"; failed=1; return; }
    timeout --kill-after=5 "$seconds" "$@" >"$results/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed=1
    case $status in 0) said=good ;; 124 | 137) said="stopped after $seconds s" ;; *) said="FAILED ($status)" ;; esac
    printf '%-28s %4d s  %s\n' "$name" $((SECONDS - start)) "$said" | tee -a "$results/steps.txt"
}
: >"$results/steps.txt"

measure() {  # NAME SECONDS ARGUMENTS...
    local name=$1 seconds=$2
    shift 2
    step "$name" "$seconds" "$python" tools/benchmark "$@" --device "$device" --json "$results/$name.json"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda coco=coco cityscapes=cityscapes rounds=10 slower=1
    precisions="fp32 tf32 fp16" select=(-m gpu -n 8)
else
    device=cpu coco=192x256 cityscapes=256x512 rounds=1 slower=4
    precisions="fp32 bf16" select=(tests/layers tests/modeling/test_merging.py)
fi
graphs=(--opts MODEL.ACCELERATION.CUDA_GRAPHS True)

step tests 100 "$python" -m pytest -q -p no:cacheprovider "${select[@]}"
measure launches $((50 * slower)) launches
for precision in $precisions; do
    common=(inference --rounds $rounds --precision "$precision")
    measure "inference-$precision" $((35 * slower)) "${common[@]}" --sizes $coco --detections 30 100
    measure "cityscapes-$precision" 35 "${common[@]}" --sizes $cityscapes --detections 30
    [ $device = cpu ] ||
        measure "graphs-$precision" 35 "${common[@]}" --sizes $coco --detections 30 "${graphs[@]}"
done
for precision in fp32 ${precisions##* }; do
    measure "training-$precision" 75 training --rounds 3 --images 2 --precision "$precision" \
        --sizes $coco --data-images 1
done
measure kernels $((40 * slower)) kernels --sizes $coco

echo
"$python" tools/benchmark table "$results"/*.json | tee "$results/table.txt"
rm -rf "$environment"
exit $failed
