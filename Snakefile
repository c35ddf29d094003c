# Lets plain `snakemake` in the repository's root work; the workflow is workflow/Snakefile.
include: "workflow/Snakefile"


workflow.default_target = "all"
