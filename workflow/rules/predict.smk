# Perturbations outside the screen, predicted by a model that was trained on all of it.


rule predict:
    """Predict what the config asks for, ranked by effect size, with a statement of trust for each."""
    input:
        model=get_predicting_model,
        pairs="results/{dataset}/none/fold0/pair/pairs.h5",
        metrics="results/{dataset}/perturbation/evaluate/metrics.tsv",
        summary="results/{dataset}/perturbation/evaluate/summary.tsv",
        trust="results/{dataset}/perturbation/evaluate/trust.tsv",
        splits=get_evaluated_folds("split.tsv"),
        infos=get_evaluated_folds("split.json"),
        requests=get_request_file,
    output:
        predictions="results/{dataset}/predict/predictions.h5ad",
        table="results/{dataset}/predict/predictions.tsv",
        record="results/{dataset}/predict/provenance/predict.json",
    log:
        "logs/{dataset}/predict.log",
    benchmark:
        "logs/benchmarks/{dataset}/predict.tsv"
    conda:
        "../../envs/embed.yaml"
    threads: lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["torch_threads"]
    resources:
        gpu=one_gpu,
    params:
        model=lambda wildcards: predicting_model(wildcards.dataset),
        seed=CONFIG.seeds[0],
        folds=lambda wildcards: get_folds(wildcards.dataset, "perturbation"),
        predict=CONFIG.predict,
        settings=settings_of("evaluate"),
        device=lambda wildcards: CONFIG.settings(wildcards.dataset, "train")["device"],
        library=library("predict"),
    script:
        "../scripts/predict.py"
