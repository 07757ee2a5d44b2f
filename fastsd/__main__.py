"""`python -m fastsd`, the command line as torchrun starts it."""

from fastsd.cli import program

if __name__ == "__main__":
    program()
