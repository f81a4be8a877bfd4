#!/usr/bin/env bash
# Rehearse a training YAML on CPU processes, with a tiny model, before NPUs are paid for.
#
#   bash scripts/rehearse.sh examples/glm4_dpo/finetune_glm4_9b.yaml 8 [FOLDER [PROCESS_YAML PREDICT_YAML]]
#   DEVICE=Ascend bash scripts/rehearse.sh ...    the same on N NPUs, in bfloat16
#
# Only sizes, bfloat16, the device, the number of steps and the learning rate differ from the YAMLs. The rest is the same:
# parallel plan, flash attention, sink mode, recomputation, accumulation, LoRA, optimizer sharding, KV cache.
# scripts/rig/README.md lists every key. It preprocesses, trains some steps on N processes, stops them by SIGTERM,
# resumes, merges, predicts, and compares with one process that has no plan and the CPU's own cells.
# Exit status: 0 if the results agree, 1 if the plan is wrong, 2 if the rehearsal cannot run.
# Needs g++ and MindSpore 2.7. Takes some minutes for 8 processes on 2 cores. An earlier rehearsal in FOLDER (default:
# output/rehearsal) is deleted.
set -euo pipefail
usage="usage: bash scripts/rehearse.sh CONFIG N [FOLDER [PROCESS_YAML PREDICT_YAML]]; CONFIG: YAML with run_mode finetune, \
N: number of cards, PROCESS_YAML and PREDICT_YAML: default to those of the 9B model"
fail() { echo "error: $1" >&2; exit "${2:-2}"; }
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  cat <<EOF
usage: bash scripts/rehearse.sh CONFIG N [FOLDER [PROCESS_YAML PREDICT_YAML]]
  CONFIG        YAML with run_mode finetune
  N             number of cards of its parallel plan, above 1
  FOLDER        for all results: new, empty or of an earlier rehearsal, which is deleted (default:
                output/rehearsal)
  PROCESS_YAML, PREDICT_YAML
                of the other commands (default: those of the 9B model)
With DEVICE=Ascend in front, it runs on N NPUs (default: CPU). Exit status: 0 if the results agree with one process,
1 if the plan is wrong, 2 if the rehearsal cannot run. Takes some minutes for 8 processes on 2 cores.
example: bash scripts/rehearse.sh examples/glm4_dpo/finetune_glm4_9b.yaml 8
EOF
  exit 0
fi
[[ $# == 2 || $# == 3 || $# == 5 ]] || fail "$usage"
root=$(cd "$(dirname "$0")/.." && pwd)
example=$root/examples/glm4_dpo rig=$root/scripts/rig
config=$1 cards=$2 out=${3:-output/rehearsal}
process=${4:-$example/process_glm4_9b.yaml} predict=${5:-$example/predict_glm4_9b.yaml}
for file in "$config" "$process" "$predict"; do [[ -f $file ]] || fail "$file: no such file; $usage"; done
[[ $cards =~ ^[0-9]+$ && $cards -gt 1 ]] || fail "N is '$cards'; a whole number above 1 expected"
device=${DEVICE:-CPU}
[[ $device == Ascend ]] || command -v g++ >/dev/null || fail "g++ is missing (apt-get install g++): the rehearsal builds a small library with it"
config=$(realpath "$config") process=$(realpath "$process") predict=$(realpath "$predict") out=$(realpath -m "$out")
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$root GLOG_v=${GLOG_v:-3}
for file in "$config" "$process" "$predict"; do
  [[ $file != "$out"/* ]] || fail "$file: lies in FOLDER, $out, whose files are deleted; give another FOLDER"
done
[[ -f $out/.rehearsal || ! -e $out || -z $(ls -A "$out") ]] || \
  fail "$out: holds files that are no rehearsal's, and a rehearsal deletes files there; give a new FOLDER"
mkdir -p "$out"
touch "$out/.rehearsal"
rm -rf "$out"/{hf,one,many,output,log,log_*,answer_*,*.yaml,*.ckpt*,*.mindrecord*,*.jsonl,*.txt}
cd "$out"

step() { printf '== %s\n' "$1"; }
explain() { # NAME: print why it failed
  python "$root/scripts/rehearse.py" explain "$1.txt" "log_$1"
  exit 1
}
quietly() { # NAME COMMAND...: run it with its output in NAME.txt; print the reason if it fails
  local name=$1
  shift
  "$@" >"$name.txt" 2>&1 || explain "$name"
}
on_cards() { # NAME COMMAND: run it on N processes that form the plan
  [[ $device == CPU ]] || exec bash "$root/scripts/msrun_launcher.sh" "$2" "$cards" 0 "log_$1" True 600
  LD_PRELOAD=$build/librig_hook.so exec bash "$root/scripts/msrun_launcher.sh" "'$rig/on_cpu.py' '$build' $2" \
    "$cards" 0 "log_$1" True 600
}
options() { # CONFIG OUTPUT_DIR: print the options of training
  echo "--config $1 --train_dataset train.mindrecord --vocab_file hf/tokenizer.model --load_checkpoint tiny.ckpt" \
    "--auto_trans_ckpt True --output_dir $2"
}
train="'$example/run_dpo.py' $(options many.yaml many)"
answer() { # NAME CONFIG CHECKPOINT [OPTIONS]: predict, with stdout in answer_NAME
  quietly "predict_$1" bash -c '"$@" >answer_'"$1" - python "$example/run_dpo.py" --config "$2" --load_checkpoint "$3" \
    "${@:4}" --vocab_file hf/tokenizer.model --predict_data "How do I start running?"
}

python "$root/scripts/rehearse.py" shrink "$config" "$process" "$predict" "$cards" . "$device"
[[ $device == Ascend ]] || build=$(bash "$rig/build.sh") || fail "the rig could not be built"
step "a tiny model and pairs, their reference log-probs (2 workers)"
quietly make python "$example/make_tiny_glm4.py" --output_path . --config many.yaml
quietly convert python "$root/convert_weight.py" --model glm-n --input_path hf/ --output_path tiny.ckpt --dtype fp32
quietly preprocess bash "$root/scripts/msrun_launcher.sh" "'$example/dpo_preprocess_glm4_parallel.py' --src train.jsonl \
  --dst train.mindrecord --config process.yaml --tokenizer hf/tokenizer.model --load_checkpoint tiny.ckpt" \
  2 0 log_preprocess True 600
step "training in one process"
quietly one python "$example/run_dpo.py" $(options one.yaml one)
step "training on $cards workers, until SIGTERM after the first steps"
(on_cards stopped "$train") >stopped.txt 2>&1 &
launcher=$!
until [[ -s many/metrics.jsonl ]] || ! kill -0 $launcher 2>/dev/null; do sleep 0.1; done
kill -TERM $launcher 2>/dev/null || true
status=0
wait $launcher || status=$?
[[ $status == 143 ]] || explain stopped
grep -h "stopped by SIGTERM" stopped.txt || explain stopped
step "resumed, to the end"
(on_cards many "$train --resume auto") >many.txt 2>&1 || explain many
grep -h "^resuming from" many.txt || explain many
step "merge and predict"
base=()
! grep -q '^lora:' many.yaml || base=(--base_checkpoint=tiny.ckpt)
quietly merge_one python "$root/transform_checkpoint.py" --src_checkpoint=one/checkpoint_network "${base[@]}" \
  --dst_checkpoint=one/merged
quietly merge_many python "$root/transform_checkpoint.py" --src_checkpoint=many/checkpoint_network \
  --src_strategy=many/strategy "${base[@]}" --dst_checkpoint=many/merged
if [[ ${#base[@]} == 0 ]]; then
  answer before predict.yaml tiny.ckpt
  answer before_plain plain.yaml tiny.ckpt
fi
answer after predict.yaml many/merged/merged.ckpt
answer after_plain plain.yaml many/merged/merged.ckpt
[[ ${#base[@]} == 0 ]] || answer after_adapters predict.yaml tiny.ckpt \
  --adapter_checkpoint many/checkpoint_network --src_strategy many/strategy
python "$root/scripts/rehearse.py" compare . "$cards" "$device"
