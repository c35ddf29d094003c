# Raw files: fetched from an address or linked, verified, unpacked; or simulated. A local file or folder
# without a checksum is read where it is and needs no rule.


rule download:
    """Fetch one file of a screen, resumably, or link to a local one, and verify its checksum."""
    input:
        local=get_local,
    output:
        file="resources/datasets/{dataset}/{file}",
        record="resources/datasets/{dataset}/provenance/{file}.json",
    log:
        "logs/{dataset}/download/{file}.log",
    wildcard_constraints:
        dataset=CONFIG.pattern("downloaded"),
        file=CONFIG.file_pattern(),
    conda:
        "../../envs/download.yaml"
    threads: 1
    # No digest of the library here: a verified file need not be fetched again because code changed.
    params:
        url=lambda wildcards: CONFIG.source(wildcards.dataset)
        .file(wildcards.file)
        .address,
        checksum=lambda wildcards: CONFIG.source(wildcards.dataset)
        .file(wildcards.file)
        .checksum,
    script:
        "../scripts/download.py"


rule unpack:
    """Unpack the archives of a screen into one folder, whole or not at all."""
    input:
        archives=lambda wildcards: CONFIG.source(wildcards.dataset).archives,
    output:
        folder=directory("resources/datasets/{dataset}/unpacked"),
        record="resources/datasets/{dataset}/provenance/unpack.json",
    log:
        "logs/{dataset}/download/unpack.log",
    wildcard_constraints:
        dataset=CONFIG.pattern("unpacked_folder"),
    conda:
        "../../envs/download.yaml"
    threads: 1
    params:
        library=library("unpack"),
    script:
        "../scripts/unpack.py"


rule unpack_file:
    """Get the one file of a screen out of its archive or compression."""
    input:
        packed=lambda wildcards: CONFIG.source(wildcards.dataset).packed,
    output:
        file="resources/datasets/{dataset}/unpacked/{file}",
        record="resources/datasets/{dataset}/unpacked/provenance/{file}.json",
    log:
        "logs/{dataset}/download/unpacked_{file}.log",
    wildcard_constraints:
        dataset=CONFIG.pattern("unpacked_file"),
        file="[^/]+",
    conda:
        "../../envs/download.yaml"
    threads: 1
    params:
        library=library("unpack_file"),
    script:
        "../scripts/unpack_file.py"


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
