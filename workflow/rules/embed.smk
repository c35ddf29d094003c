# Embeddings of every cell, predictions of every held-out perturbation, and the positive controls.


rule embed:
    """Embed every cell and predict the held-out perturbations, with all trained models of a fold and seed."""
    input:
        models=lambda wildcards: files_of_models(
            wildcards, trainable_models(), "train/model.pt"
        ),
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
    output:
        embeddings=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed{{seed}}/embed/embeddings.h5ad",
            model=trainable_models(),
        ),
        predictions=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed{{seed}}/embed/predictions.h5ad",
            model=trainable_models(),
        ),
        oracles=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{oracle}/seed{{seed}}/embed/predictions.h5ad",
            oracle=[ORACLES[model] for model in oracle_models()],
        ),
        record=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed{{seed}}/embed/provenance/embed.json",
            model=[
                *trainable_models(),
                *(ORACLES[model] for model in oracle_models()),
            ],
        ),
    log:
        "logs/{dataset}/{split}/fold{fold}/embed/seed{seed}.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/embed/seed{seed}.tsv"
    conda:
        "../../envs/embed.yaml"
    threads: lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["torch_threads"]
    resources:
        gpu=one_gpu,
    params:
        models=trainable_models(),
        oracles={model: ORACLES[model] for model in oracle_models()},
        half_seed=lambda wildcards: CONFIG.settings(wildcards.dataset, "evaluate")[
            "half_seed"
        ],
        device=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["device"],
        library=library("embed"),
    script:
        "../scripts/embed.py"


rule references:
    """Let half of a perturbation's own cells predict it: the technical duplicate."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
    output:
        duplicate="results/{dataset}/{split}/fold{fold}/duplicate/seed0/embed/predictions.h5ad",
        interpolated_duplicate="results/{dataset}/{split}/fold{fold}/interpolated_duplicate/seed0/embed/predictions.h5ad",
        record=expand(
            "results/{{dataset}}/{{split}}/fold{{fold}}/{model}/seed0/embed/provenance/references.json",
            model=REFERENCES,
        ),
    log:
        "logs/{dataset}/{split}/fold{fold}/references.log",
    conda:
        "../../envs/evaluate.yaml"
    threads: 1
    params:
        half_seed=lambda wildcards: CONFIG.settings(wildcards.dataset, "evaluate")[
            "half_seed"
        ],
        library=library("references"),
    script:
        "../scripts/references.py"


rule user_predictions:
    """Check predictions made elsewhere, and write them as the predictions of any model."""
    input:
        predictions=get_user_file,
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
    output:
        predictions="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/predictions.h5ad",
        record="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/provenance/user_predictions.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/{model}/seed{seed}/user_predictions.log",
    wildcard_constraints:
        model="|".join(user_models()) or "none",
    conda:
        "../../envs/evaluate.yaml"
    threads: 1
    params:
        target_sum=lambda wildcards: CONFIG.settings(wildcards.dataset, "preprocess")[
            "target_sum"
        ],
        distribution=lambda wildcards: CONFIG.settings(wildcards.dataset, "evaluate")[
            "distribution"
        ],
        library=library("user_predictions"),
    script:
        "../scripts/user_predictions.py"


rule representation:
    """Compare the embedding with PCA and an untrained encoder, on cells that training never saw."""
    input:
        model="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/train/model.pt",
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
    output:
        representation="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/representation.tsv",
        record="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/provenance/representation.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/{model}/seed{seed}/representation.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/{model}/seed{seed}/representation.tsv"
    conda:
        "../../envs/embed.yaml"
    threads: lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["torch_threads"]
    resources:
        gpu=one_gpu,
    params:
        device=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["device"],
        library=library("representation"),
    script:
        "../scripts/representation.py"


rule umap:
    """Lay the embedding out in two dimensions for the report."""
    input:
        embeddings="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/embeddings.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
    output:
        umap="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/umap.tsv",
        record="results/{dataset}/{split}/fold{fold}/{model}/seed{seed}/embed/provenance/umap.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/{model}/seed{seed}/umap.log",
    # Half a minute of a single thread, which should not be what the report waits for at the end.
    priority: 1
    conda:
        "../../envs/umap.yaml"
    threads: 1
    params:
        seed=lambda wildcards: CONFIG.settings(wildcards.dataset, "embed")["umap_seed"],
        library=library("umap_cells"),
    script:
        "../scripts/umap_cells.py"
