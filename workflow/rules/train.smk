# Each latent model in a job of its own; the simple models of a fold in one job, and so the simple heads.


rule train:
    """Train the encoder on masked cells, then the predictor on populations of cells."""
    input:
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
        encoder=get_encoder,
    output:
        model="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train/model.pt",
        history="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train/history.tsv",
        metrics="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train/metrics.json",
        record="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train/provenance/train.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train.tsv"
    wildcard_constraints:
        model="|".join(trainable_models()) or "none",
    conda:
        "../../envs/train.yaml"
    threads: train_threads
    resources:
        gpu=train_gpus,
    params:
        settings=get_train_settings,
        library=library("train"),
    script:
        "../scripts/train.py"


rule baselines:
    """Fit the simple models that a deep one must beat, and write their predictions."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
        responses=[],
    output:
        predictions=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed0/embed/predictions.h5ad",
            model=baseline_models(),
        ),
        record=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed0/embed/provenance/baselines.json",
            model=baseline_models(),
        ),
    log:
        "logs/{dataset}/{split}/fold{fold}/baselines.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/baselines.tsv"
    conda:
        "../../envs/embed.yaml"
    threads: 1
    params:
        models=baseline_models(),
        responses=[],
        settings=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")[
            "baselines"
        ],
        library=library("baselines"),
    script:
        "../scripts/baselines.py"


# A job of its own, since only some datasets name another screen.
use rule baselines as other_screen with:
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
        responses=get_responses,
    output:
        predictions=[
            f"results/{{dataset}}/{{split}}/fold{{fold}}/{OTHER_SCREEN}/seed0/embed/predictions.h5ad"
        ],
        record=f"results/{{dataset}}/{{split}}/fold{{fold}}/{OTHER_SCREEN}/seed0/embed/provenance/other_screen.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/other_screen.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/other_screen.tsv"
    params:
        models=[OTHER_SCREEN],
        responses=lambda wildcards: CONFIG.source(wildcards.dataset).responses,
        settings=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")[
            "baselines"
        ],
        library=library("baselines"),


rule heads:
    """Fit ridge and nearest neighbours on the embeddings of the trained models of a fold and seed."""
    input:
        models=lambda wildcards: files_of_models(
            wildcards, head_sources(), "train/model.pt"
        ),
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
    output:
        predictions=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed{{seed}}/embed/predictions.h5ad",
            model=head_models(),
        ),
        record=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed{{seed}}/embed/provenance/heads.json",
            model=head_models(),
        ),
    log:
        "logs/{dataset}/{split}/fold{fold}/heads/seed{seed}.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/heads/seed{seed}.tsv"
    conda:
        "../../envs/embed.yaml"
    threads: lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["torch_threads"]
    resources:
        gpu=one_gpu,
    params:
        models=head_models(),
        sources=head_sources(),
        neighbours=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")[
            "baselines"
        ]["neighbours"],
        torch_threads=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")[
            "torch_threads"
        ],
        device=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["device"],
        library=library("heads"),
    script:
        "../scripts/heads.py"
