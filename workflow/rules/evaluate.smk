# Scores of every model on the held-out perturbations, folds pooled.


rule evaluate:
    """Score all models on the test perturbations, with intervals, paired tests and a verdict."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        splits=get_fold_files("pair/split.tsv"),
        split_infos=get_fold_files("pair/split.json"),
        pairs=get_pairs,
        predictions=get_predictions,
        gene_sets=get_pathways,
    output:
        metrics="results/{dataset}/{split}/evaluate/metrics.tsv",
        summary="results/{dataset}/{split}/evaluate/summary.tsv",
        enrichment="results/{dataset}/{split}/evaluate/enrichment.tsv",
        strata="results/{dataset}/{split}/evaluate/strata.tsv",
        trust="results/{dataset}/{split}/evaluate/trust.tsv",
        verdict="results/{dataset}/{split}/evaluate/verdict.json",
        truth="results/{dataset}/{split}/evaluate/observed.h5ad",
    log:
        "logs/{dataset}/{split}/evaluate.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/evaluate.tsv"
    conda:
        "../../envs/evaluate.yaml"
    threads: 1
    params:
        folds=lambda wildcards: get_folds(wildcards.dataset, wildcards.split),
        predictions=lambda wildcards: prediction_runs(
            wildcards.dataset, wildcards.split
        ),
        settings=settings_of("evaluate"),
        library=library("evaluate"),
    script:
        "../scripts/evaluate.py"
