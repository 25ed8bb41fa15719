#!/bin/bash
# The experiments, on a laptop's CPU: what experts and director bring, and when.
#
#     bash tests/lab/experiments.sh REAL                      everything: some hours on two cores
#     bash tests/lab/experiments.sh REAL pretrain ablation    some parts alone, in this order
#     SEEDS=0 bash tests/lab/experiments.sh REAL              one seed; others in other shells
#     REHEARSAL=10 bash tests/lab/experiments.sh REAL         a tenth of all steps and epochs, in
#                                                             out/rehearsal-10
#
# REAL holds pretrain/<Modality>/<source> and tasks/{HC18,COVID-CXR-3class,EyeDisease-4class,
# PneumoniaMNIST}, as they are downloaded. What is finished is left as it is, so the script may be
# stopped at any moment and started again. A seed takes 9 GB of disk. The script prints the tables of
# modularity and probes; the others come from
#
#     python -m tests.lab.report out/*/*              losses and scores, over seeds
#     python -m tests.lab.scaling out/tune/*          scaling.png
#
# Networks are pretrained under these names: `mae` is the plain masked autoencoder, `experts` has
# experts without the alignment loss, `dex` has everything. `mae138` is the masked autoencoder with
# the computing of DEX, 1.38 times the steps. Names with ph- are the same on phantoms; ph-mae-long
# and ph-dex-long train twice as long, ph-dex-2000 and ph-mae-2760 five times as long, and ph-k1 has
# one activated expert. Left out of RESULTS.md is what needs changed code (four rows of "The gate"
# and its table of changes) or quiet cores ("Speed").
set -e
cd "$(dirname "$0")/../.."
real=${1:?where are the real images? give the folder that holds pretrain and tasks}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
seeds=${SEEDS:-0 1 2}
out=out${REHEARSAL:+/rehearsal-$REHEARSAL}

# few COUNT LEAST: so many steps or epochs, in a rehearsal fewer, but at least LEAST
few() {
    local count=$(($1 / ${REHEARSAL:-1}))
    echo $((count < $2 ? $2 : count))
}

# task NAME OPTIONS...: prepare a labelled task; it lies in data/ only when it is whole
task() {
    [ -e data/$1 ] || python prepare_medverse.py --task "$@"
}

# phantom_task NAME OPTIONS...: the same for a simulated task
phantom_task() {
    [ -e data/$1 ] || python -m tests.lab.phantoms --size 64 --out data/$1 --task "$@"
}

# fill_heads: data/raw-hc18 is a link to the heads of REAL, and their outlines, filled
fill_heads() {
    mkdir -p data/raw-hc18
    ln -sfn "$(realpath -m "$real/tasks/HC18")" data/raw-hc18/HC18
    python -m tests.lab.convert outline data/raw-hc18
}

# unpack_chests: data/raw-pneumonia/task has the images of REAL's file of MedMNIST as PNG
unpack_chests() {
    python -m tests.lab.convert medmnist "$real/tasks/PneumoniaMNIST/pneumoniamnist.npz" \
        data/raw-pneumonia/task data/raw-pneumonia/source
}

prepare() {
    if [ ! -e data/phantoms-64/done ]; then
        python prepare_medverse.py --raw "$real/pretrain" --out data/real --size 128
        python -m tests.lab.phantoms --out data/phantoms-64 --size 64
        touch data/phantoms-64/done
    fi
    task covid-cxr --raw "$real/tasks/COVID-CXR-3class" --size 128
    task eye-disease --raw "$real/tasks/EyeDisease-4class" --size 128 --patient '\d+_|\w+_\d+'
    [ -e data/raw-pneumonia/task ] || [ -e data/pneumonia ] || unpack_chests
    task pneumonia --raw data/raw-pneumonia/task --size 128 --min_side 28
    [ -e data/hc18 ] || fill_heads
    task hc18 --raw data/raw-hc18 --size 128 --images '(.*)\.png' --masks 'filled/(.*)_Annotation' \
        --classes background head --values 0 255
    phantom_task phantom-organs
    phantom_task phantom-vessels
    phantom_task phantom-lesion --count 1200
}

# As pretrain.py, but it keeps the network at the validations after a fifth and half of the steps.
keeping='
from dataclasses import asdict

import pretrain
train, write_line = pretrain.train, pretrain.write_line
def train_and_keep(run):
    def write_and_keep(log, entry):
        write_line(log, entry)
        step = entry["step"] + 1
        if "val" in entry and round(10 * step / run.plan.steps) in (2, 5):
            network = dict(config=asdict(run.model.config), options=asdict(run.o),
                           identity=run.identity, model=run.model.state_dict(), done=step)
            pretrain.save(run.out / f"step-{step}.pt", network)
    pretrain.write_line = write_and_keep
    return train(run)
pretrain.train = train_and_keep
pretrain.main()'

# train NAME SEED STEPS OPTIONS...: pretrain a network; where it is finished, this takes seconds
train() {
    local name=$1 seed=$2 steps=$3 program=(pretrain.py)
    shift 3
    [[ $name = *-2000 || $name = *-2760 ]] && program=(-c "$keeping")
    python "${program[@]}" --model tiny --depth 4 --batch 64 --lr 8e-3 --steps $(few $steps 10) \
        --seed $seed --out $out/$seed/$name --resume "$@"
}

# tune TASK NETWORK SEED OPTIONS...: fine-tune a network as --adapt says; without that word, a plain
# network is tuned as the plain ViT that it is
tune() {
    local task=$1 network=$2 seed=$3 from how
    shift 3
    from="--init $out/$seed/$network/ckpt.pt"
    [ $network = scratch ] && from='--init scratch --model tiny --depth 4'
    [[ $network = scratch && $task = phantom* ]] && from+=' --patch 8'
    [[ "$*" = *--adapt* || $network = *dex || $network = *experts ]] || set -- --adapt director "$@"
    case $task in
        covid-cxr | eye-disease) how="--lr 3e-4 --epochs $(few 20 1)" ;;
        hc18) how="--lr 1e-3 --epochs $(few 40 1)" ;;
        phantom-lesion) how='' ;;       # given with each
        phantom-*) how="--lr 1e-3 --epochs $(few 15 1)" ;;
    esac
    local folder=$out/tune/$(echo $task $network $seed $* | tr -d - | tr ' ' _)
    [ -e $folder/results.json ] ||
        python finetune.py --task $task $from --batch 8 $how --seed $seed --out $folder \
            --resume "$@"
}

# train_phantoms NAME SEED STEPS OPTIONS...: pretrain a network on phantoms
train_phantoms() {
    train "$@" --data data/phantoms-64 --size 64 --patch 8 --val_share 0.2
}

# Table 6 on simulated images
phantoms() {
    for seed in $seeds; do
        train_phantoms ph-mae $seed 400 --experts 0
        train_phantoms ph-experts $seed 400 --align 0
        train_phantoms ph-dex $seed 400
        train_phantoms ph-mae138 $seed 552 --experts 0
        train_phantoms ph-dex-long $seed 800
        train_phantoms ph-mae-long $seed 1104 --experts 0
        train_phantoms ph-dex-2000 $seed 2000
        train_phantoms ph-mae-2760 $seed 2760 --experts 0
        for network in scratch ph-mae ph-experts ph-dex ph-mae138; do
            for task in phantom-organs phantom-vessels; do
                tune $task $network $seed
                tune $task $network $seed --tune_blocks 0
                tune $task $network $seed --fraction 0.2
            done
            # naevus or melanoma: a linear layer on what was pretrained, then all of a plain ViT on
            # 30 images, which are drawn three times
            tune phantom-lesion $network $seed --tune_blocks 0 --batch 16 --lr 3e-3 \
                --epochs $(few 8 1) --warmup_epochs 1
            for draw in $seed $((seed + 10)) $((seed + 20)); do
                tune phantom-lesion $network $seed --adapt director --fraction 0.05 --batch 16 \
                    --lr 3e-4 --epochs $(few 40 1) --warmup_epochs 4 --seed $draw
            done
        done
    done
}

pretrain() {
    local options='--data data/real --size 128 --val_share 0.1'
    for seed in $seeds; do
        train dex $seed 500 $options
        train mae $seed 500 $options --experts 0
        train experts $seed 500 $options --align 0
        train mae138 $seed 690 $options --experts 0
    done
}

# Table 6 on real images
ablation() {
    for seed in $seeds; do
        for network in scratch mae experts dex mae138; do
            tune covid-cxr $network $seed
            tune eye-disease $network $seed
            tune hc18 $network $seed
            tune hc18 $network $seed --tune_blocks 0
        done
    done
}

# Table 4, and what makes the difference: the pretraining, or the network that is tuned?
adapt() {
    for seed in $seeds; do
        for task in covid-cxr eye-disease; do
            tune $task scratch $seed --adapt experts
            tune $task mae $seed --adapt experts
            tune $task experts $seed --adapt director
            tune $task dex $seed --adapt director
        done
    done
}

# Fig. 5; the first two are also of the parts above
scaling() {
    for seed in $seeds; do
        tune eye-disease dex $seed
        tune eye-disease scratch $seed --adapt experts
        for top_k in 1 4 8; do
            tune eye-disease dex $seed --top_k $top_k
        done
        for fraction in 0.2 0.4 0.6 0.8; do
            tune eye-disease dex $seed --fraction $fraction
            tune eye-disease scratch $seed --adapt experts --fraction $fraction
        done
        for blocks in 0 1 2 3; do
            tune eye-disease dex $seed --tune_blocks $blocks
        done
    done
}

# one activated expert, beside plain networks of 1.11, 1.27 and 1.43 times the steps
gate() {
    for seed in $seeds; do
        train_phantoms ph-k1 $seed 400 --top_k 1
        for steps in 443 508 573; do
            train_phantoms ph-mae-$steps $seed $steps --experts 0
        done
    done
    python -m tests.lab.probe $out/*/ph-{k1,mae-443,mae-508,mae-573}/ckpt.pt
}

# of networks pretrained on phantoms
modularity() {
    python -m tests.lab.modularity $out/*/ph-{mae,experts,dex}/ckpt.pt
}

# what frozen features know
probe() {
    python -m tests.lab.probe $out/*/ph-{mae,dex,mae138,experts}/ckpt.pt
    python -m tests.lab.probe $out/*/ph-{dex-2000,mae-2760}/ckpt.pt
    python -m tests.lab.probe $out/*/ph-{dex-2000,mae-2760}/step-*.pt
    for task in eye-disease covid-cxr hc18 pneumonia; do
        python -m tests.lab.probe $out/*/{mae,experts,dex,mae138}/ckpt.pt --task $task
    done
}

prepare
shift
for part in ${@:-phantoms modularity gate pretrain ablation adapt scaling probe}; do
    $part
done
