# Instruction sets. A source file whose name ends in the name of one, such as kernels_avx2.cpp, is
# compiled for it; the functions in it are called only where csrc/common/processor.hpp finds support at
# run time. If the target's architecture or the compiler does not have the instruction set, the file is
# left out; otherwise FASTGPT_HAS_AVX2 (and so on) is defined.
include(CheckCXXCompilerFlag)

# fastgpt_instruction_set(NAME OPTIONS...)
macro(fastgpt_instruction_set name)
  string(TOUPPER FASTGPT_HAS_${name} has)
  check_cxx_compiler_flag("${ARGN}" ${has})
  if(${has})
    add_compile_definitions(${has})
    set(FASTGPT_OPTIONS_${name} ${ARGN})
  endif()
endmacro()

if(NOT MSVC)
  # The floating-point exception flags are never read. Preserving them would keep the compiler from
  # vectorizing the loops of GELU.
  set(FASTGPT_NO_TRAPS -fno-trapping-math)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    fastgpt_instruction_set(avx2 -mavx2 -mfma)
    fastgpt_instruction_set(avx512 -mavx512f)
    fastgpt_instruction_set(avx512_bf16 -mavx512f -mavx512bw -mavx512vl -mavx512bf16)
    fastgpt_instruction_set(avx512_vnni -mavx512f -mavx512bw -mavx512vl -mavx512vnni)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    fastgpt_instruction_set(neon)
    fastgpt_instruction_set(neon_dot -march=armv8.2-a+dotprod)
  endif()
endif()

# Sets the options of csrc/FOLDER/*_SET.cpp for each instruction set: the given ones, and its own.
function(fastgpt_set_options folder) # OPTIONS...
  foreach(set avx2 avx512 avx512_bf16 avx512_vnni neon neon_dot)
    string(TOUPPER FASTGPT_HAS_${set} has)
    file(GLOB files ${CMAKE_SOURCE_DIR}/csrc/${folder}/*_${set}.cpp)
    foreach(file IN LISTS files)
      if(${has})
        set_source_files_properties(${file} PROPERTIES COMPILE_OPTIONS
                                                       "${ARGN};${FASTGPT_OPTIONS_${set}}")
      else()
        set_source_files_properties(${file} PROPERTIES HEADER_FILE_ONLY ON)
      endif()
    endforeach()
  endforeach()
endfunction()
