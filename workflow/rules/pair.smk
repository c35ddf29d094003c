# What is held out, and what training may see of the rest.


rule freeze_split:
    """Deal the perturbations into folds and freeze what this fold holds out."""
    input:
        cells="results/{dataset}/preprocess/cells.h5ad",
    output:
        split="results/{dataset}/{split}/fold{fold}/pair/split.tsv",
        info="results/{dataset}/{split}/fold{fold}/pair/split.json",
    params:
        settings=settings_of("pair"),
        library=library("freeze_split"),
    log:
        "logs/{dataset}/{split}/fold{fold}/pair/split.log",
    threads: 1
    conda:
        "../../envs/preprocess.yaml"
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
    output:
        pairs="results/{dataset}/{split}/fold{fold}/pair/pairs.h5",
    params:
        settings=settings_of("pair"),
        library=library("pair"),
    log:
        "logs/{dataset}/{split}/fold{fold}/pair/pairs.log",
    benchmark:
        "logs/benchmarks/{dataset}/{split}/fold{fold}/pair/pairs.tsv"
    threads: 1
    conda:
        "../../envs/preprocess.yaml"
    script:
        "../scripts/pair.py"
