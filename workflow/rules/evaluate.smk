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
        summary=report(
            "results/{dataset}/{split}/evaluate/summary.tsv",
            caption="../report/summary.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Scores of all models and metrics"},
        ),
        enrichment="results/{dataset}/{split}/evaluate/enrichment.tsv",
        strata=report(
            "results/{dataset}/{split}/evaluate/strata.tsv",
            caption="../report/strata.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Scores by strata"},
        ),
        trust=report(
            "results/{dataset}/{split}/evaluate/trust.tsv",
            caption="../report/trust.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Expected and observed accuracy"},
        ),
        verdict="results/{dataset}/{split}/evaluate/verdict.json",
        truth="results/{dataset}/{split}/evaluate/observed.h5ad",
        record="results/{dataset}/{split}/evaluate/provenance/evaluate.json",
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
