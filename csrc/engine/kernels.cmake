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

set_source_files_properties(${CMAKE_SOURCE_DIR}/csrc/engine/kernels_portable.cpp
                            PROPERTIES COMPILE_OPTIONS "${FASTGPT_ENGINE_FLAGS}")
fastgpt_set_options(engine ${FASTGPT_ENGINE_FLAGS})
