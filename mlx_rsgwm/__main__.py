"""``python -m mlx_rsgwm``: the command line, where the script ``rsgwm`` is not on the path."""

from mlx_rsgwm.cli.main import main

if __name__ == "__main__":
    main()
