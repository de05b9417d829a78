"""The edges: PEFT, GGUF and the Hub, and the proof that what crosses them is unchanged."""

from mlx_rsgwm.models.file_readers import FILE_READERS, FileReader


def _gguf_reader() -> FileReader:
    from mlx_rsgwm.converters.gguf.read import CONVERSION_VERSION, convert_gguf

    return FileReader(CONVERSION_VERSION, convert_gguf)


FILE_READERS[".gguf"] = _gguf_reader
