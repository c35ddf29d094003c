# Raw files: fetched from an address and verified, or simulated. A local path needs no rule.


rule download:
    """Fetch the file of a published screen, resumably, and verify its checksum."""
    output:
        file="resources/datasets/{dataset}/{file}",
        record="resources/datasets/{dataset}/provenance/{file}.json",
    log:
        "logs/{dataset}/download/{file}.log",
    wildcard_constraints:
        dataset=CONFIG.pattern("downloaded"),
        file="[^/]+",
    conda:
        "../../envs/download.yaml"
    threads: 1
    # No digest of the library here: a verified file need not be fetched again because code changed.
    params:
        url=lambda wildcards: CONFIG.source(wildcards.dataset).address,
        checksum=lambda wildcards: CONFIG.source(wildcards.dataset).checksum,
    script:
        "../scripts/download.py"


rule simulate:
    """Simulate a screen whose truth is known, with the network and gene sets that go with it."""
    input:
        parameters=workflow.source_path("../../resources/simulator.json"),
    output:
        raw="resources/datasets/{dataset}/raw.h5ad",
        guides="resources/datasets/{dataset}/guides.csv",
        network="resources/datasets/{dataset}/network.tsv.gz",
        gene_sets="resources/datasets/{dataset}/gene_sets.gmt",
        truth="resources/datasets/{dataset}/truth.h5ad",
        truth_cells="resources/datasets/{dataset}/truth_cells.tsv.gz",
        record="resources/datasets/{dataset}/provenance/simulate.json",
    log:
        "logs/{dataset}/download/simulate.log",
    benchmark:
        "logs/benchmarks/{dataset}/download/simulate.tsv"
    wildcard_constraints:
        dataset=CONFIG.pattern("simulated"),
    conda:
        "../../envs/preprocess.yaml"
    threads: 1
    params:
        settings=lambda wildcards: CONFIG.settings(wildcards.dataset, "download")[
            "simulator"
        ],
        library=library("simulate"),
    script:
        "../scripts/simulate.py"
