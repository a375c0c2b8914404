# Compile options of the engine's files. Include after instructions.cmake.
#
# -ffp-contract=off: products and sums are fused only where the code does so explicitly, so that
#   weights and inputs are rounded the same way on all processors.
# -Wno-uninitialized, -Wno-maybe-uninitialized: GCC 12 warns of the undefined values in its own
#   intrinsics.
# -fno-tree-pre, -fno-gcse: these optimizations of GCC spill tiles of registers to memory in each
#   iteration of a loop.
set(FASTGPT_ENGINE_FLAGS ${FASTGPT_NO_TRAPS})
if(NOT MSVC)
  file(GLOB FASTGPT_ENGINE_FILES ${CMAKE_SOURCE_DIR}/csrc/engine/*.cpp)
  set_source_files_properties(${FASTGPT_ENGINE_FILES} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
  list(APPEND FASTGPT_ENGINE_FLAGS -fno-math-errno -ffp-contract=off)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND FASTGPT_ENGINE_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized -fno-tree-pre
         -fno-gcse)
  endif()
endif()

# Sets the options of the source file `name`; further arguments select its instruction set.
function(fastgpt_engine_file name)
  set_source_files_properties(${CMAKE_SOURCE_DIR}/csrc/${name}.cpp
                              PROPERTIES COMPILE_OPTIONS "${FASTGPT_ENGINE_FLAGS};${ARGN}")
endfunction()

fastgpt_engine_file(engine/kernels_portable)
fastgpt_engine_file(engine/kernels_avx2 ${FASTGPT_AVX2})
fastgpt_engine_file(engine/kernels_avx512 ${FASTGPT_AVX512})
if(FASTGPT_KNOWS_BF16)
  fastgpt_engine_file(engine/kernels_avx512_bf16 ${FASTGPT_AVX512_BF16})
endif()
if(FASTGPT_KNOWS_VNNI)
  fastgpt_engine_file(engine/kernels_avx512_vnni ${FASTGPT_AVX512_VNNI})
endif()
fastgpt_engine_file(engine/kernels_neon)
if(FASTGPT_KNOWS_NEON_DOT)
  fastgpt_engine_file(engine/kernels_neon_dot ${FASTGPT_NEON_DOT})
endif()
