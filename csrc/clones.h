// Several versions of a function in plain C++, for the widest vectors the CPU has, chosen when the library is loaded.
// Sanitizers cannot run the resolver that chooses; clang has another syntax for it.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define KT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KT_CLONES
#endif
