#!/bin/sh
# The study of docs/downstream.md: pretrain two encoders on unlabelled scenes, then measure them against random weights.
#   docs/scenes_study.sh SCENES OUT
# Two jobs at a time with one thread each, which on two cores is about twice as fast as one job with two threads. What
# has its results already is left out, and what was stopped goes on, so the study may be started again. Each job is named
# when it starts; its words are in OUT/logs.
set -eu
scenes=$1 out=$2
export OMP_NUM_THREADS=1
mkdir -p "$out/logs"
if command -v flock > /dev/null; then  # jobs hold it too: a second study would take what they just began for left-overs
  exec 9> "$out/.lock"
  flock -n 9 || { echo "error: a study is running in $out" >&2; exit 2; }
fi

together() {  # runs the commands of stdin, one a line, two at a time
  xargs -d '\n' -P 2 -I{} sh -c '{}'
}

job() {  # NAME RESULT COMMAND...: the command as a line for `together`, unless its result is there
  label=$1 log=$out/logs/$1.log result=$2 folder=$(dirname "$2") more=
  shift 2
  [ -e "$result" ] && return
  if ls "$folder"/checkpoints/step-* > /dev/null 2>&1; then more=--resume; else rm -rf "$folder"; fi
  echo "date '+%H:%M $label'; $* $more >> '$log' 2>&1 || echo 'failed: $log'"
}

for arch in vit swin; do
  run=$out/pretrained/$arch
  job "pretrain-$arch" "$run/encoder" hybrid-ssl pretrain "recipes/scenes_$arch.yaml" "'data.source=$scenes/unlabeled'" \
    "'data.probe.source=$scenes/objects'" "'run.out=$run'"
done | together

for seed in 0 1; do
  for arch in vit swin; do
    encoder="'$out/pretrained/$arch/encoder'"
    for start in "" --random; do
      name=$arch$start-$seed
      job "detection-$name" "$out/detection/$name/results.json" hybrid-ssl finetune detection "$encoder" $start \
        --seed $seed --data "'$scenes'" --recipe recipes/finetune/detect_scenes.yaml --out "'$out/detection/$name'"
      job "segmentation-$name" "$out/segmentation/$name/results.json" hybrid-ssl finetune segmentation "$encoder" $start \
        --seed $seed --data "'$scenes'" --recipe recipes/finetune/segment_scenes.yaml --out "'$out/segmentation/$name'"
      job "classification-$name" "$out/classification/$name/results.json" hybrid-ssl finetune classification "$encoder" \
        $start --seed $seed --data "'$scenes/objects'" --recipe recipes/finetune/classify_objects.yaml \
        --out "'$out/classification/$name'"
      job "frozen-$name" "$out/frozen/$name/lowshot/results.json" hybrid-ssl evaluate "$encoder" $start --seed $seed \
        --data "'$scenes/objects'" --protocol knn,linear,lowshot data.size=128 --out "'$out/frozen/$name'"
    done
  done
done | together

hybrid-ssl results "$out/detection" "$out/segmentation" "$out/classification" "$out/frozen" --out "$out/tables"
