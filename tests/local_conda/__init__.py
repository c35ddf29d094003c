"""A conda for tests, on the solver and installer of py-rattler and a channel of this very environment.

It executes ``snakemake --use-conda`` without any public channel: every environment file is parsed and
solved, every environment is created, activated, and holds what its file asks for and what that requires. A
rule then runs with its file's packages, and with one exception with no others: Snakemake puts its own search
path behind the environment's, so a package that Snakemake itself needs, such as jinja2 or requests, is found
though a file lacks it. That no file lacks one, test_imports.py says by the syntax tree. Neither proves that
the public channels carry these versions, that their builds work together, or which of them (CUDA or not) a
solver would choose.
"""
