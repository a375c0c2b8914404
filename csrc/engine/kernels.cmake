# How the engine is compiled; to be included where that is done, after instructions.cmake. Weights and
# inputs are to be rounded alike on all processors: no product and sum in one, but where it is asked
# for. GCC 12 takes what its own intrinsics leave undefined for a mistake, and the last two of its
# optimisations copy tiles of registers to memory in each turn of a loop.
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

function(fastgpt_engine_file name) # and the instructions that it may use
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
