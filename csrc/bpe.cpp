#include "bpe.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "pretokenizer.hpp"

namespace fastgpt {
namespace {

// Up to this many bytes, scanning a piece for its next merge is quicker than keeping a heap.
constexpr std::size_t kShortPiece = 64;

constexpr std::uint64_t kNoPair = std::numeric_limits<std::uint64_t>::max();
constexpr TokenId kNoToken = std::numeric_limits<TokenId>::max();

// 2^64 divided by the golden ratio: multiplying by it spreads nearby keys over the high bits.
constexpr std::uint64_t kSpread = 0x9E3779B97F4A7C15;

std::uint64_t pair_key(TokenId left, TokenId right) {
  return static_cast<std::uint64_t>(left) << 32 | right;
}

// Returns log2 of a table size that leaves at least half of the slots free.
int table_bits(std::size_t entries) {
  int bits = 4;
  while ((std::size_t{1} << bits) < 2 * entries) ++bits;
  return bits;
}

template <typename Word>
std::uint64_t load(const char* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

std::uint64_t hash_bytes(std::string_view bytes) {
  const auto mix = [](std::uint64_t x) {
    x *= kSpread;
    return x ^ x >> 32;
  };
  const char* at = bytes.data();
  std::size_t left = bytes.size();
  std::uint64_t hash = left;
  for (; left > 8; at += 8, left -= 8) hash = mix(hash ^ load<std::uint64_t>(at));
  // The last 1 to 8 bytes, in two loads that may overlap.
  if (left >= 4) {
    const std::uint64_t high = load<std::uint32_t>(at + left - 4);
    return mix(mix(hash) ^ (load<std::uint32_t>(at) | high << 32));
  }
  std::uint64_t tail = 0;
  for (; left > 0; ++at, --left) tail = tail << 8 | static_cast<unsigned char>(*at);
  return mix(mix(hash) ^ tail);
}

std::string numbered(const char* what, std::size_t number) {
  return std::string(what) + " " + std::to_string(number);
}

}  // namespace

MergeTable::MergeTable(const std::vector<Merge>& merges) {
  const int bits = table_bits(merges.size());
  slots_.assign(std::size_t{1} << bits, Slot{kNoPair, kNoMerge});
  shift_ = 64 - bits;
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::uint64_t pair = pair_key(merges[i].left, merges[i].right);
    Slot& slot = slots_[slot_of(pair)];
    if (slot.pair == pair) {
      throw std::invalid_argument(numbered("merge", i) + " repeats " +
                                  numbered("merge", slot.rank));
    }
    slot = {pair, static_cast<Rank>(i)};
  }
}

Rank MergeTable::rank(TokenId left, TokenId right) const {
  return slots_[slot_of(pair_key(left, right))].rank;
}

// Returns the slot that holds the pair, or the free one where it would go.
std::size_t MergeTable::slot_of(std::uint64_t pair) const {
  std::size_t at = static_cast<std::size_t>(pair * kSpread >> shift_);
  while (slots_[at].pair != pair && slots_[at].pair != kNoPair) at = (at + 1) & (slots_.size() - 1);
  return at;
}

TokenBytes::TokenBytes(const std::vector<std::string>& tokens) {
  begins_.reserve(tokens.size() + 1);
  begins_.push_back(0);
  for (const std::string& token : tokens) {
    bytes_ += token;
    begins_.push_back(bytes_.size());
  }
}

TokenTable::TokenTable(const TokenBytes& tokens)
    : tokens_(tokens), slots_(std::size_t{1} << table_bits(tokens.size()), Slot{0, kNoToken}) {}

void TokenTable::insert(TokenId id) {
  const std::string_view bytes = tokens_[id];
  const std::uint64_t hash = hash_bytes(bytes);
  std::size_t at = hash & (slots_.size() - 1);
  while (slots_[at].id != kNoToken) at = (at + 1) & (slots_.size() - 1);
  slots_[at] = {hash, id};
  longest_ = std::max(longest_, bytes.size());
}

bool TokenTable::find(std::string_view bytes, TokenId& id) const {
  if (bytes.size() > longest_) return false;
  const std::uint64_t hash = hash_bytes(bytes);
  for (std::size_t at = hash & (slots_.size() - 1); slots_[at].id != kNoToken;
       at = (at + 1) & (slots_.size() - 1)) {
    if (slots_[at].hash == hash && tokens_[slots_[at].id] == bytes) {
      id = slots_[at].id;
      return true;
    }
  }
  return false;
}

// Merges one piece at a time, keeping its buffers from piece to piece.
class BytePairEncoder::PieceMerger {
 public:
  explicit PieceMerger(const BytePairEncoder& encoder) : encoder_(encoder) {}

  // Appends the ids of the piece.
  void merge(std::string_view piece, std::vector<TokenId>& ids) {
    if (piece.size() <= kShortPiece) {
      merge_by_scanning(piece, ids);
    } else {
      merge_by_heap(piece, ids);
    }
  }

 private:
  // A token of a long piece, in a doubly linked list.
  struct Node {
    TokenId id;
    Rank rank;  // of merging it with the next
    std::uint32_t previous;
    std::uint32_t next;
  };
  static constexpr std::uint32_t kNoNode = std::numeric_limits<std::uint32_t>::max();

  TokenId byte_id(char byte) const { return encoder_.byte_ids_[static_cast<unsigned char>(byte)]; }

  void merge_by_scanning(std::string_view piece, std::vector<TokenId>& ids) const {
    std::array<TokenId, kShortPiece> tokens;
    std::array<Rank, kShortPiece> ranks;  // of merging tokens[i] with tokens[i + 1]
    std::size_t count = piece.size();
    for (std::size_t i = 0; i < count; ++i) tokens[i] = byte_id(piece[i]);
    const auto rank_at = [&](std::size_t i) {
      return i + 1 < count ? encoder_.ranks_.rank(tokens[i], tokens[i + 1]) : kNoMerge;
    };
    for (std::size_t i = 0; i < count; ++i) ranks[i] = rank_at(i);

    while (true) {
      const auto lowest = std::min_element(ranks.begin(), ranks.begin() + count);
      if (*lowest == kNoMerge) break;
      const auto at = static_cast<std::size_t>(lowest - ranks.begin());
      tokens[at] = encoder_.merges_[*lowest].merged;
      std::copy(tokens.begin() + at + 2, tokens.begin() + count, tokens.begin() + at + 1);
      std::copy(ranks.begin() + at + 2, ranks.begin() + count, ranks.begin() + at + 1);
      --count;
      ranks[at] = rank_at(at);
      if (at > 0) ranks[at - 1] = rank_at(at - 1);
    }
    ids.insert(ids.end(), tokens.begin(), tokens.begin() + count);
  }

  void merge_by_heap(std::string_view piece, std::vector<TokenId>& ids) {
    link(piece);
    while (!candidates_.empty()) {
      std::pop_heap(candidates_.begin(), candidates_.end(), std::greater<>());
      const auto at = static_cast<std::uint32_t>(candidates_.back());
      const auto rank = static_cast<Rank>(candidates_.back() >> 32);
      candidates_.pop_back();
      // A candidate is out of date when another merge has taken one of its tokens since.
      if (nodes_[at].rank != rank) continue;
      nodes_[at].id = encoder_.merges_[rank].merged;
      unlink_next(at);
      update(at);
      if (nodes_[at].previous != kNoNode) update(nodes_[at].previous);
    }
    for (std::uint32_t at = 0; at != kNoNode; at = nodes_[at].next) ids.push_back(nodes_[at].id);
  }

  // Sets up one node a byte, and a candidate for each pair that merges.
  void link(std::string_view piece) {
    if (piece.size() >= kNoNode) {
      throw std::length_error("a run of 4 GiB without a break between words: split the text");
    }
    const auto count = static_cast<std::uint32_t>(piece.size());
    nodes_.resize(count);
    for (std::uint32_t i = 0; i < count; ++i) {
      nodes_[i] = {byte_id(piece[i]), kNoMerge, i == 0 ? kNoNode : i - 1,
                   i + 1 == count ? kNoNode : i + 1};
    }
    candidates_.clear();
    for (std::uint32_t i = 0; i < count; ++i) {
      nodes_[i].rank = rank_at(i);
      if (nodes_[i].rank != kNoMerge) candidates_.push_back(candidate(i));
    }
    std::make_heap(candidates_.begin(), candidates_.end(), std::greater<>());
  }

  void unlink_next(std::uint32_t at) {
    Node& gone = nodes_[nodes_[at].next];
    gone.rank = kNoMerge;
    nodes_[at].next = gone.next;
    if (gone.next != kNoNode) nodes_[gone.next].previous = at;
  }

  // Looks up the merge of a node whose token or neighbour has changed.
  void update(std::uint32_t at) {
    nodes_[at].rank = rank_at(at);
    if (nodes_[at].rank == kNoMerge) return;
    candidates_.push_back(candidate(at));
    std::push_heap(candidates_.begin(), candidates_.end(), std::greater<>());
  }

  Rank rank_at(std::uint32_t at) const {
    const Node& node = nodes_[at];
    return node.next == kNoNode ? kNoMerge : encoder_.ranks_.rank(node.id, nodes_[node.next].id);
  }

  // Rank and place in one number, so that the smallest is the lowest rank, then the leftmost.
  std::uint64_t candidate(std::uint32_t at) const {
    return static_cast<std::uint64_t>(nodes_[at].rank) << 32 | at;
  }

  const BytePairEncoder& encoder_;
  std::vector<Node> nodes_;
  std::vector<std::uint64_t> candidates_;  // a heap, smallest first
};

BytePairEncoder::BytePairEncoder(const std::vector<std::string>& tokens, std::vector<Merge> merges)
    : tokens_(tokens), merges_(std::move(merges)), ranks_(merges_), whole_pieces_(tokens_) {
  check();
  index_bytes();
  index_whole_pieces();
}

void BytePairEncoder::encode(std::string_view text, std::vector<TokenId>& ids) const {
  PieceMerger merger(*this);
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = piece_end(text, begin);
    const std::string_view piece = text.substr(begin, end - begin);
    if (TokenId id; whole_pieces_.find(piece, id)) {
      ids.push_back(id);
    } else {
      merger.merge(piece, ids);
    }
    begin = end;
  }
}

std::string BytePairEncoder::decode(const TokenId* ids, std::size_t count) const {
  std::size_t size = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (ids[i] >= tokens_.size()) {
      throw std::out_of_range(numbered("token id", ids[i]) + " is out of range");
    }
    size += tokens_[ids[i]].size();
  }
  std::string bytes(size, '\0');
  char* to = bytes.data();
  for (std::size_t i = 0; i < count; ++i) {
    const std::string_view token = tokens_[ids[i]];
    to = std::copy(token.begin(), token.end(), to);
  }
  return bytes;
}

void BytePairEncoder::check() const {
  if (tokens_.size() >= kNoToken || merges_.size() >= kNoMerge) {
    throw std::invalid_argument("a vocabulary must have fewer than 2^32 - 1 tokens and merges");
  }
  for (std::size_t i = 0; i < merges_.size(); ++i) {
    const Merge& merge = merges_[i];
    if (std::max({merge.left, merge.right, merge.merged}) >= tokens_.size()) {
      throw std::invalid_argument(numbered("merge", i) + " names an id that has no token");
    }
    const std::string_view left = tokens_[merge.left];
    const std::string_view merged = tokens_[merge.merged];
    const bool joined = merged.size() == left.size() + tokens_[merge.right].size() &&
                        merged.substr(0, left.size()) == left &&
                        merged.substr(left.size()) == tokens_[merge.right];
    if (!joined) {
      throw std::invalid_argument(numbered("merge", i) +
                                  " makes a token that is not its two parts");
    }
  }
}

void BytePairEncoder::index_bytes() {
  std::fill(std::begin(byte_ids_), std::end(byte_ids_), kNoToken);
  for (TokenId id = 0; id < tokens_.size(); ++id) {
    const std::string_view bytes = tokens_[id];
    if (bytes.empty()) throw std::invalid_argument(numbered("token", id) + " is empty");
    if (bytes.size() > 1) continue;
    TokenId& byte_id = byte_ids_[static_cast<unsigned char>(bytes[0])];
    if (byte_id != kNoToken) {
      throw std::invalid_argument(numbered("token", id) + " is the same byte as " +
                                  numbered("token", byte_id));
    }
    byte_id = id;
  }
  const auto* missing = std::find(std::begin(byte_ids_), std::end(byte_ids_), kNoToken);
  if (missing != std::end(byte_ids_)) {
    const auto byte = static_cast<std::size_t>(missing - std::begin(byte_ids_));
    throw std::invalid_argument("no token for " + numbered("byte", byte));
  }
}

// A piece that is a token as a whole needs no merging, provided that merging would arrive at that
// token: true of all of GPT-2's, but not of a special token, nor of every vocabulary.
void BytePairEncoder::index_whole_pieces() {
  PieceMerger merger(*this);
  std::vector<TokenId> ids;
  for (TokenId id = 0; id < tokens_.size(); ++id) {
    ids.clear();
    merger.merge(tokens_[id], ids);
    if (ids.size() == 1 && ids[0] == id) whole_pieces_.insert(id);
  }
}

}  // namespace fastgpt
