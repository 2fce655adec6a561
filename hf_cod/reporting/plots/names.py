"""Names of models, layers and metrics in the texts of plots."""


def literal(name: str) -> str:
    r"""A name for matplotlib, which reads text between two dollar signs as a formula unless they are written as \$."""
    return name.replace("$", r"\$")
