#!/usr/bin/env bash
# Run the full pipeline on a CPU with a tiny GLM-4: set-up, model, pairs, the five commands, a score, the card, a summary.
#   bash quickstart.sh        needs Python 3.11; installs in about a minute, runs in about a minute and a half
set -euo pipefail
cd "$(dirname "$0")"
source scripts/setup.sh requirements.txt requirements-serve.txt # the second for --chat

out=$PWD/output/quickstart
log=$out/log
rm -rf "$out"
mkdir -p "$log"
cd examples/glm4_dpo
launcher=../../scripts/msrun_launcher.sh
tokenizer=$out/hf/tokenizer.model
questions=("怎么开始学跑步？" "I am bad at running." "怎么开始学木工？") # the last one is not in the training data

step() { printf '\n== %s\n' "$1"; }
preprocess() { # NAME: $out/NAME.jsonl -> $out/NAME.mindrecord
  bash $launcher "dpo_preprocess_glm4_parallel.py --src '$out/$1.jsonl' --dst '$out/$1.mindrecord' \
    --config process_glm4_tiny.yaml --tokenizer '$tokenizer' --load_checkpoint '$out/glm4_tiny.ckpt' \
    --auto_trans_ckpt False --seq_len 256 --dataset_type cvalues" 2 0 "$log/preprocess_$1" True 600
}

step "a tiny GLM-4 and sample pairs"
python make_tiny_glm4.py --output_path "$out"
step "1. convert the weights"
python ../../convert_weight.py --model glm-n --input_path "$out/hf/" --output_path "$out/glm4_tiny.ckpt" --dtype fp32
step "2. preprocess: tokens and reference log-probs"
preprocess train
preprocess held_out
step "3. train, two workers"
bash $launcher "run_dpo.py --config finetune_glm4_tiny.yaml --train_dataset '$out/train.mindrecord' \
  --eval_dataset '$out/held_out.mindrecord' --vocab_file '$tokenizer' --load_checkpoint '$out/glm4_tiny.ckpt' \
  --auto_trans_ckpt False --output_dir '$out/run'" 2 0 "$log/finetune" True 600
step "4. merge the workers' checkpoints"
python ../../transform_checkpoint.py --src_checkpoint="$out/run/checkpoint_network" --src_strategy="$out/run/strategy" \
  --dst_checkpoint="$out/merged"
step "5. predict, before and after training"
printf '%s\n' "${questions[@]}" > "$out/questions.txt"
python run_dpo.py --config predict_glm4_tiny.yaml --load_checkpoint "$out/merged/merged.ckpt" --auto_trans_ckpt False \
  --vocab_file "$tokenizer" --predict_file "$out/questions.txt" --compare_with "$out/glm4_tiny.ckpt" --output "$out/answers"
step "score the held-out pairs"
python run_dpo.py --config score_glm4_tiny.yaml --load_checkpoint "$out/merged/merged.ckpt" --vocab_file "$tokenizer" \
  --score_data "$out/held_out.mindrecord" --output "$out/score"
cd ../..
step "add both to the card of the training"
python -m mindrlhf.card add "$out/run/card" --checkpoint "$out/merged/merged.ckpt" --score "$out/score" \
  --answers "$out/answers.jsonl"
python scripts/quickstart_summary.py "$out"
