"""PyInstaller's hook of edgelm: modules imported by name on first use, the embedded model, and the files of pages."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

hiddenimports = [*collect_submodules("edgelm"), "edgelm_models"]
datas = [
    *collect_data_files("edgelm_models"),
    *collect_data_files("edgelm.pictures"),
    *collect_data_files("edgelm.serve.playground"),
]
