# The page that people read, the page that compares them, and the record of how all was made.


rule report:
    """Write the report of one dataset and split: verdict, calibration, models, perturbations, QC."""
    input:
        metrics="results/{dataset}/{split}/evaluate/metrics.tsv",
        summary="results/{dataset}/{split}/evaluate/summary.tsv",
        enrichment="results/{dataset}/{split}/evaluate/enrichment.tsv",
        verdict="results/{dataset}/{split}/evaluate/verdict.json",
        observed="results/{dataset}/{split}/evaluate/observed.h5ad",
        strata="results/{dataset}/{split}/evaluate/strata.tsv",
        trust="results/{dataset}/{split}/evaluate/trust.tsv",
        splits_info=get_fold_files("pair/split.json"),
        qc="results/{dataset}/preprocess/qc.tsv",
        perturbations="results/{dataset}/preprocess/perturbations.tsv",
        coverage=get_coverage,
        predictions=get_predictions,
        histories=get_training("history.tsv"),
        train_metrics=get_training("metrics.json"),
        umap=get_maps,
        representation=get_representation,
    output:
        html=report(
            "results/{dataset}/{split}/report.html",
            caption="../report/report.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Report"},
        ),
        headline=report(
            "results/{dataset}/{split}/report/headline.tsv",
            caption="../report/headline.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Headline table"},
        ),
        calibration=report(
            "results/{dataset}/{split}/report/calibration.svg",
            caption="../report/calibration.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Calibration strip"},
        ),
        scatter=report(
            "results/{dataset}/{split}/report/scatter.svg",
            caption="../report/scatter.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Predicted against observed"},
        ),
        record=[
            "results/{dataset}/{split}/provenance/report.json",
            "results/{dataset}/{split}/report/provenance/report.json",
        ],
    log:
        "logs/{dataset}/{split}/report.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/report.tsv"
    wildcard_constraints:
        split="|".join(SCHEMES) or "(?!)",
    conda:
        "../../envs/report.yaml"
    threads: 1
    params:
        dataset="{dataset}",
        split="{split}",
        predictions=lambda wildcards: prediction_runs(
            wildcards.dataset, wildcards.split
        ),
        histories=lambda wildcards: shown_trainings(wildcards.dataset, wildcards.split),
        settings=lambda wildcards: CONFIG.resolved(wildcards.dataset),
        qc_page=lambda wildcards: qc_page(wildcards.dataset, "../../"),
        library=library("report"),
    script:
        "../scripts/report.py"


rule unevaluated:
    """Say what was trained on everything, and that nothing of it could be evaluated."""
    input:
        splits_info=get_fold_files("pair/split.json"),
        train_metrics=get_training("metrics.json"),
    output:
        html=report(
            "results/{dataset}/{split}/report.html",
            caption="../report/unevaluated.rst",
            category="{dataset}",
            subcategory="{split}",
            labels={"item": "Report"},
        ),
        record="results/{dataset}/{split}/provenance/unevaluated.json",
    log:
        "logs/{dataset}/{split}/report.log",
    wildcard_constraints:
        split=NO_SPLIT,
    conda:
        "../../envs/report.yaml"
    threads: 1
    params:
        dataset="{dataset}",
        trainings=lambda wildcards: shown_trainings(wildcards.dataset, wildcards.split),
        schemes=SCHEMES,
        predicts=CONFIG.predict is not None,
        settings=lambda wildcards: CONFIG.resolved(wildcards.dataset),
        qc_page=lambda wildcards: qc_page(wildcards.dataset, "../../"),
        library=library("unevaluated"),
    script:
        "../scripts/unevaluated.py"


rule index:
    """Compare all datasets, splits and models on one page."""
    input:
        summaries=of_all_splits("evaluate/summary.tsv"),
        verdicts=of_all_splits("evaluate/verdict.json"),
    output:
        html=report(
            "results/index.html",
            caption="../report/index.rst",
            category="All reports",
            labels={"item": "All datasets and splits"},
        ),
        record="results/provenance/index.json",
    log:
        "logs/index.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    params:
        entries=[
            {
                "dataset": dataset,
                "split": split,
                "confidence": CONFIG.settings(dataset, "evaluate")["confidence"],
                "qc_page": qc_page(dataset, ""),
            }
            for dataset in DATASETS
            for split in SCHEMES
        ],
        unevaluated=[
            {
                "dataset": dataset,
                "split": NO_SPLIT,
                "qc_page": qc_page(dataset, ""),
            }
            for dataset in unevaluated()
        ],
        library=library("index"),
    script:
        "../scripts/index.py"


rule provenance:
    """Record versions, commit, resolved config, checksums and run times of all results."""
    input:
        reports=reports(),
        qc_pages=qc_pages(DATASETS),
        splits=folds_of_all("pair/split.json"),
        metrics=of_all_splits("evaluate/metrics.tsv"),
        index="results/index.html",
        predictions=predictions_asked(),
    output:
        report(
            "results/provenance.json",
            caption="../report/provenance.rst",
            category="All reports",
            labels={"item": "How the results were made"},
        ),
    log:
        "logs/provenance.log",
    conda:
        "../../envs/report.yaml"
    threads: 1
    params:
        config={dataset: CONFIG.resolved(dataset) for dataset in DATASETS},
        library=library("provenance"),
    script:
        "../scripts/provenance.py"
