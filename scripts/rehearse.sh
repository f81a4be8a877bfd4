#!/usr/bin/env bash
# Rehearse the parallel plan of a training YAML on CPU processes, with a tiny model, before NPUs are paid for.
#
#   bash scripts/rehearse.sh examples/glm4_dpo/finetune_glm4_9b.yaml 8 [FOLDER]
#
# The parallel, recomputation, LoRA and optimizer sections, the numbers of heads and groups and the structure of a layer
# stay; widths, layers, vocabulary and positions shrink. It preprocesses, trains 3 steps on N processes and on one,
# merges, predicts, and compares. Status: 0 all agrees, 1 the plan is wrong, 2 it could not be tried.
# Needs g++ and MindSpore 2.7. FOLDER (default: output/rehearsal) is written anew. About 2 minutes for 8 processes on 2 cores.
set -euo pipefail
usage="usage: bash scripts/rehearse.sh CONFIG N [FOLDER]; CONFIG: YAML with run_mode finetune, N: number of cards"
fail() { echo "error: $1" >&2; exit "${2:-2}"; }
[[ $# == 2 || $# == 3 ]] || fail "$usage"
[[ -f $1 ]] || fail "$1: no such file; $usage"
[[ $2 =~ ^[0-9]+$ && $2 -gt 1 ]] || fail "N is '$2'; a whole number above 1 expected"
command -v g++ >/dev/null || fail "g++ is missing (apt-get install g++): the rehearsal builds a small library with it"

root=$(cd "$(dirname "$0")/.." && pwd)
config=$(realpath "$1") cards=$2 out=$(realpath -m "${3:-output/rehearsal}")
example=$root/examples/glm4_dpo rig=$root/scripts/rig
export PYTHONPATH=$root GLOG_v=${GLOG_v:-3}
mkdir -p "$out"
rm -rf "$out"/{hf,one,many,log,*.yaml,*.ckpt*,*.mindrecord*,*.jsonl,*.txt}
cd "$out"

step() { printf '== %s\n' "$1"; }
quietly() { # NAME COMMAND...: its output goes to NAME.txt; where it fails, the reason is shown
  local name=$1
  shift
  "$@" >"$name.txt" 2>&1 || { python "$root/scripts/rehearse.py" explain "$name.txt" log; exit 1; }
}
train() { # CONFIG OUTPUT_DIR: the command that trains
  echo "$example/run_dpo.py --config $1 --train_dataset train.mindrecord --vocab_file hf/tokenizer.model" \
    "--load_checkpoint tiny.ckpt --auto_trans_ckpt True --output_dir $2"
}
finish() { # OUTPUT_DIR: merge what was trained, and let it answer
  local strategy=()
  [[ $1 == one ]] || strategy=(--src_strategy="$1/strategy")
  grep -q '^lora:' many.yaml && strategy+=(--base_checkpoint=tiny.ckpt)
  quietly "merge_$1" python "$root/transform_checkpoint.py" --src_checkpoint="$1/checkpoint_network" \
    "${strategy[@]}" --dst_checkpoint="$1/merged"
  quietly "answer_$1" python "$example/run_dpo.py" --config predict.yaml --load_checkpoint "$1/merged/merged.ckpt" \
    --vocab_file hf/tokenizer.model --predict_data "How do I start running?"
}

python "$root/scripts/rehearse.py" shrink "$config" "$cards" .
build=$(bash "$rig/build.sh") || fail "the rig could not be built"
step "a tiny model and pairs, their reference log-probs"
quietly make python "$example/make_tiny_glm4.py" --output_path . --config many.yaml
quietly convert python "$root/convert_weight.py" --model glm-n --input_path hf/ --output_path tiny.ckpt --dtype fp32
quietly preprocess python "$example/dpo_preprocess_glm4_parallel.py" --src train.jsonl --dst train.mindrecord \
  --config process.yaml --tokenizer hf/tokenizer.model --load_checkpoint tiny.ckpt
step "3 steps in one process"
quietly one python $(train one.yaml one)
step "3 steps on $cards processes"
LD_PRELOAD=$build/librig_hook.so quietly many bash "$root/scripts/msrun_launcher.sh" \
  "$rig/on_cpu.py '$build' $(train many.yaml many)" "$cards" 0 log True 600
step "merge and predict"
finish one
finish many
python "$root/scripts/rehearse.py" compare . "$cards"
