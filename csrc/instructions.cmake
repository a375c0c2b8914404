# Compiler options for files that are compiled for particular instruction sets. If the compiler does
# not support an instruction set, its kernels are left out.
include(CheckCXXCompilerFlag)

if(MSVC)
  set(FASTGPT_AVX2 /arch:AVX2)
  set(FASTGPT_AVX512 /arch:AVX512)
else()
  # The floating-point exception flags are never read. Preserving them would keep the compiler from
  # vectorizing the loops of GELU.
  set(FASTGPT_NO_TRAPS -fno-trapping-math)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(FASTGPT_AVX2 -mavx2 -mfma)
    set(FASTGPT_AVX512 -mavx512f)
    set(FASTGPT_AVX512_BF16 -mavx512f -mavx512bw -mavx512vl -mavx512bf16)
    set(FASTGPT_AVX512_VNNI -mavx512f -mavx512bw -mavx512vl -mavx512vnni)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(FASTGPT_NEON_DOT -march=armv8.2-a+dotprod)
  endif()
endif()
check_cxx_compiler_flag("${FASTGPT_AVX512_BF16}" FASTGPT_KNOWS_BF16)
check_cxx_compiler_flag("${FASTGPT_AVX512_VNNI}" FASTGPT_KNOWS_VNNI)
check_cxx_compiler_flag("${FASTGPT_NEON_DOT}" FASTGPT_KNOWS_NEON_DOT)
