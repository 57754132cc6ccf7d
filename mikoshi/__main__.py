"""`python -m mikoshi` is the `mikoshi` command, also under torchrun, srun and accelerate."""

from mikoshi.launch.cli.main import command

if __name__ == "__main__":
    command()
