# Guide assignment, quality control, normalization, on-target effect.


rule preprocess:
    """Assign guides, drop cells of low quality, normalize, and describe every perturbation."""
    input:
        raw=get_raw,
        cell_metadata=get_table("cell_metadata"),
        guide_table=get_table("guide_table"),
        guide_counts=get_table("guide_counts"),
        guide_calls=get_table("guide_calls"),
    output:
        cells="results/{dataset}/preprocess/cells.h5ad",
        qc="results/{dataset}/preprocess/qc.tsv",
        perturbations="results/{dataset}/preprocess/perturbations.tsv",
        guide_calls="results/{dataset}/preprocess/guide_calls.tsv",
        guides_per_cell="results/{dataset}/preprocess/guides_per_cell.tsv",
        guide_umis="results/{dataset}/preprocess/guide_umis.tsv",
        batches="results/{dataset}/preprocess/batches.tsv",
        distributions="results/{dataset}/preprocess/distributions.tsv",
        record="results/{dataset}/preprocess/provenance/preprocess.json",
    log:
        "logs/{dataset}/preprocess/preprocess.log",
    benchmark:
        "logs/benchmarks/{dataset}/preprocess/preprocess.tsv"
    conda:
        "../../envs/preprocess.yaml"
    threads: 1
    params:
        source=lambda wildcards: CONFIG.source(wildcards.dataset).screen,
        settings=settings_of("preprocess"),
        library=library("preprocess"),
    script:
        "../scripts/preprocess.py"
