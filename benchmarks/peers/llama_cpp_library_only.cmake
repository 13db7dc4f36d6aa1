# llama-cpp-python forces this on in the cache; a plain variable of llama.cpp's own scope comes before the cache.
set(LLAMA_BUILD_COMMON OFF)
