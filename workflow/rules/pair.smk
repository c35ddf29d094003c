# What is held out, and what training may see of the rest.


rule freeze_split:
    """Decide what the fold holds out, by the scheme, and freeze it."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        listed=get_split_list,
    output:
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        record="results/{dataset}/{split}/fold{fold}/pair/provenance/freeze_split.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/pair/split.log",
    conda:
        "../../envs/preprocess.yaml"
    threads: 1
    params:
        settings=settings_of("pair"),
        library=library("freeze_split"),
    script:
        "../scripts/freeze_split.py"


rule pair:
    """Choose genes on training cells, code the perturbations, pair cells with controls."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
        networks=get_networks,
        gene_sets=get_gene_sets,
        gene_tables=get_gene_tables,
        responses=get_responses,
        requests=get_request_file,
    output:
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
        coverage="results/{dataset}/{split}/fold{fold}/pair/coverage.tsv",
        training_cells="results/{dataset}/{split}/fold{fold}/pair/training_cells.tsv",
        balance="results/{dataset}/{split}/fold{fold}/pair/balance.tsv",
        record="results/{dataset}/{split}/fold{fold}/pair/provenance/pair.json",
    log:
        "logs/{dataset}/{split}/fold{fold}/pair/pairs.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/pair/pairs.tsv"
    conda:
        "../../envs/preprocess.yaml"
    threads: 1
    params:
        settings=settings_of("pair"),
        responses=lambda wildcards: CONFIG.source(wildcards.dataset).responses,
        predict=lambda wildcards: requests_of(wildcards.split),
        library=library("pair"),
    script:
        "../scripts/pair.py"
