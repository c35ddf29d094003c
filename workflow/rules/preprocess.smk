# Guide assignment, quality control, normalization, on-target effect, and the page that shows them.


rule preprocess:
    """Assign guides, drop cells of low quality, normalize, and describe every perturbation."""
    input:
        raw=get_raw,
        cell_metadata=get_table("cell_metadata"),
        guide_table=get_table("guide_table"),
        guide_counts=get_table("guide_counts"),
        guide_calls=get_table("guide_calls"),
        cell_cycle_genes=workflow.source_path("../../resources/cell_cycle_genes.tsv"),
    output:
        cells="results/{dataset}/preprocess/cells.h5ad",
        qc="results/{dataset}/preprocess/qc.tsv",
        perturbations="results/{dataset}/preprocess/perturbations.tsv",
        guides="results/{dataset}/preprocess/guides.tsv",
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


rule qc_report:
    """Show the quality of a screen on one page: filters, cells, guides, perturbations, a map of the cells."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        qc="results/{dataset}/preprocess/qc.tsv",
        perturbations="results/{dataset}/preprocess/perturbations.tsv",
        guides="results/{dataset}/preprocess/guides.tsv",
        guide_calls="results/{dataset}/preprocess/guide_calls.tsv",
        guides_per_cell="results/{dataset}/preprocess/guides_per_cell.tsv",
        guide_umis="results/{dataset}/preprocess/guide_umis.tsv",
        batches="results/{dataset}/preprocess/batches.tsv",
        distributions="results/{dataset}/preprocess/distributions.tsv",
    output:
        html=report(
            "results/{dataset}/preprocess/qc.html",
            caption="../report/qc.rst",
            category="{dataset}",
            subcategory="preprocess",
            labels={"item": "Quality control"},
        ),
        record="results/{dataset}/preprocess/provenance/qc_report.json",
    log:
        "logs/{dataset}/preprocess/qc_report.log",
    benchmark:
        "logs/benchmarks/{dataset}/preprocess/qc_report.tsv"
    # The map takes a while of a single thread, which should not be what a run waits for at the end.
    priority: 1
    conda:
        "../../envs/qc_report.yaml"
    threads: 1
    params:
        dataset="{dataset}",
        settings=settings_of("preprocess"),
        library=library("qc_report"),
    script:
        "../scripts/qc_report.py"
