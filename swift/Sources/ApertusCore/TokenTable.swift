import Foundation

/// A byte-level BPE vocabulary in the form in which it is looked up.
///
/// It is read from `apertus_mlx_tokenizer.bin`, which `convert` writes beside `tokenizer.json`; there,
/// in `text/token_table.py`, stands what is where. Or it is made from `tokenizer.json`, which takes a
/// hundred times as long.
struct TokenTable: Sendable {
    struct Added: Equatable, Sendable {
        let id: Int32
        let content: [UInt8]
        let isSpecial: Bool
    }

    static let fileName = "apertus_mlx_tokenizer.bin"
    private static let magic = Array("APTOKEN1".utf8)

    let added: [Added]
    let preTokenizer: JSON
    let ignoresMerges: Bool
    /// Ids are below it.
    let size: Int
    private let pairs: [UInt64]
    private let ranks, results, byBytes, offsets: [UInt32]
    private let bytes: [UInt8]

    /// The bytes of an id, added tokens by their text; none for one that is not there.
    func token(_ id: Int32) -> ArraySlice<UInt8> {
        guard id >= 0, Int(id) < size else { return [] }
        return bytes[Int(offsets[Int(id)]) ..< Int(offsets[Int(id) + 1])]
    }

    /// The id of the vocabulary's entry with just these bytes; no added token.
    func find(_ piece: some Sequence<UInt8>) -> Int32? {
        let at = Self.firstIndex(in: byBytes) { !token(Int32($0)).lexicographicallyPrecedes(piece) }
        guard at < byBytes.count, token(Int32(byBytes[at])).elementsEqual(piece) else { return nil }
        return Int32(byBytes[at])
    }

    /// Rank and result of merging two ids, nil if no rule does.
    func merge(_ left: Int32, _ right: Int32) -> (rank: UInt32, id: Int32)? {
        let pair = UInt64(UInt32(bitPattern: left)) << 32 | UInt64(UInt32(bitPattern: right))
        let at = Self.firstIndex(in: pairs) { $0 >= pair }
        guard at < pairs.count, pairs[at] == pair else { return nil }
        return (ranks[at], Int32(results[at]))
    }

    /// The first index from which on `holds` holds, in an array where it holds from some place on.
    private static func firstIndex<T>(in array: [T], where holds: (T) -> Bool) -> Int {
        var (low, high) = (0, array.count)
        while low < high {
            let middle = (low + high) / 2
            if holds(array[middle]) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}

extension TokenTable {
    /// Open a table; nil if it is damaged, or made from another `tokenizer.json`.
    init?(table: Data, madeFrom digest: [UInt8]) {
        let all = [UInt8](table)
        guard all.count >= 48, Array(all[0 ..< 8]) == Self.magic, Array(all[8 ..< 40]) == digest,
            crc32(all[44...]) == all.number(at: 40)
        else { return nil }
        var at = 48 + Int(all.number(at: 44) as UInt32)
        guard at <= all.count, at % 8 == 0, let header = try? JSON(all[48 ..< at]),
            let size = header["tokens"]?.int, let entries = header["sorted"]?.int,
            let merges = header["merges"]?.int, let added = header["added_tokens"]?.items,
            let flag = header["ignore_merges"]?.flag, let cut = header["pre_tokenizer"],
            [size, entries, merges].allSatisfy({ (0 ..< Int(Int32.max)).contains($0) }),
            all.count - at >= 16 * merges + 4 * (entries + size + 1)
        else { return nil }
        pairs = all.numbers(at: &at, count: merges)
        ranks = all.numbers(at: &at, count: merges)
        results = all.numbers(at: &at, count: merges)
        byBytes = all.numbers(at: &at, count: entries)
        offsets = all.numbers(at: &at, count: size + 1)
        bytes = Array(all[at...])
        guard offsets[0] == 0, Int(offsets[size]) == bytes.count,
            zip(offsets, offsets.dropFirst()).allSatisfy({ $0 <= $1 }),
            results.allSatisfy({ $0 < size }), byBytes.allSatisfy({ $0 < size })
        else { return nil }
        guard let tokens = try? Self.addedTokens(added), tokens.allSatisfy({ $0.id < size }) else {
            return nil
        }
        (self.added, preTokenizer, ignoresMerges, self.size) = (tokens, cut, flag, size)
    }

    /// Make the table of a `tokenizer.json`.
    ///
    /// - Throws: `ApertusError`, naming the part that is no byte-level BPE.
    init(tokenizer root: JSON) throws {
        guard let model = root["model"], model["type"]?.text == "BPE",
            let vocabulary = model["vocab"]?.members, let rules = model["merges"]?.items
        else { throw Self.unsupported("model is no BPE") }
        let added = try Self.addedTokens(root["added_tokens"]?.items ?? [])
        let addedIds = Set(added.map(\.id))
        var tokens: [Int32: [UInt8]] = [:]
        var ids: [[UInt8]: Int32] = [:]
        var plain: [Int32] = []
        for entry in vocabulary {
            guard let id = entry.value.int.flatMap({ Int32(exactly: $0) }), id >= 0 else {
                throw Self.unsupported("model.vocab holds an id that is none")
            }
            ids[entry.key] = id
            if addedIds.contains(id) { continue }
            guard let bytes = ByteAlphabet.bytes(of: entry.key) else {
                throw Self.unsupported("model.vocab holds an entry that is no bytes")
            }
            guard !bytes.isEmpty, tokens.updateValue(bytes, forKey: id) == nil else {
                throw Self.unsupported("model.vocab holds an empty entry, or two with one id")
            }
            plain.append(id)
        }
        for token in added { tokens[token.id] = token.content }
        guard let last = tokens.keys.max(), last < 1 << 24 else {
            throw Self.unsupported("model.vocab is empty, or holds an id beyond 16 million")
        }
        var found: [UInt64: (rank: UInt32, id: UInt32)] = [:]
        found.reserveCapacity(rules.count)
        for (rank, rule) in rules.enumerated() {
            let names = rule.items?.compactMap(\.bytes)
                ?? rule.bytes?.split(separator: 0x20, omittingEmptySubsequences: false).map(Array.init)
            guard let names, names.count == 2, let left = ids[names[0]], let right = ids[names[1]],
                let both = ids[names[0] + names[1]]
            else { throw Self.unsupported("model.merges: rule \(rank) merges what is no token") }
            found[UInt64(UInt32(left)) << 32 | UInt64(UInt32(right))] = (UInt32(rank), UInt32(both))
        }
        let order = found.keys.sorted()
        var ends: [UInt32] = [0]
        var all: [UInt8] = []
        for id in 0 ... last {
            all += tokens[id] ?? []
            ends.append(UInt32(all.count))
        }
        self.added = added
        preTokenizer = root["pre_tokenizer"] ?? .null
        ignoresMerges = model["ignore_merges"]?.flag ?? false
        size = Int(last) + 1
        pairs = order
        ranks = order.map { found[$0]!.rank }
        results = order.map { found[$0]!.id }
        byBytes = plain.sorted { tokens[$0]!.lexicographicallyPrecedes(tokens[$1]!) }.map(UInt32.init)
        offsets = ends
        bytes = all
    }

    private static func addedTokens(_ items: [JSON]) throws -> [Added] {
        try items.map { item in
            guard let id = item["id"]?.int.flatMap({ Int32(exactly: $0) }), id >= 0,
                let content = item["content"]?.bytes, !content.isEmpty,
                let special = item["special"]?.flag
            else { throw unsupported("added_tokens holds one without id, content or flag") }
            let changes = ["lstrip", "rstrip", "single_word"].contains { item[$0]?.flag == true }
            guard !changes else { throw unsupported("added_tokens holds one that loses text") }
            // The models write LaTeX such as `\boxed{` as any other word, whatever the flag says.
            let ends = content.count > 2 ? [content[0], content[content.count - 1]] : []
            let isControl = ends == Array("<>".utf8) || ends == Array("[]".utf8)
            return Added(id: id, content: content, isSpecial: special && isControl)
        }
    }

    private static func unsupported(_ what: String) -> ApertusError {
        ApertusError(.rejected, "tokenizer.json: \(what); Apertus tokenizers are byte-level BPE")
    }
}

/// The characters by which a byte-level vocabulary writes bytes (GPT-2's).
enum ByteAlphabet {
    static let characters: [Unicode.Scalar] = {
        var next: UInt32 = 256
        return (0 ... 255).map { byte in
            if (33 ... 126).contains(byte) || (161 ... 172).contains(byte) || byte >= 174 {
                return Unicode.Scalar(UInt8(byte))
            }
            defer { next += 1 }
            return Unicode.Scalar(next)!
        }
    }()
    private static let values = Dictionary(
        uniqueKeysWithValues: zip(characters, UInt8.min ... UInt8.max))

    /// The bytes that a name of the vocabulary stands for, nil if it is none.
    static func bytes(of name: [UInt8]) -> [UInt8]? {
        var out: [UInt8] = []
        for scalar in String(decoding: name, as: UTF8.self).unicodeScalars {
            guard let byte = values[scalar] else { return nil }
            out.append(byte)
        }
        return out
    }
}

extension [UInt8] {
    fileprivate func number<T: FixedWidthInteger>(at index: Int) -> T {
        withUnsafeBytes { T(littleEndian: $0.loadUnaligned(fromByteOffset: index, as: T.self)) }
    }
    fileprivate func numbers<T: FixedWidthInteger>(at index: inout Int, count: Int) -> [T] {
        let start = index
        index += count * MemoryLayout<T>.size
        return (0 ..< count).map { number(at: start + $0 * MemoryLayout<T>.size) }
    }
}

/// The CRC-32 of zip and PNG.
private func crc32(_ bytes: ArraySlice<UInt8>) -> UInt32 {
    ~bytes.reduce(~0) { CRC32.table[Int(UInt8(truncatingIfNeeded: $0) ^ $1)] ^ $0 >> 8 }
}

private enum CRC32 {
    static let table: [UInt32] = (0 ..< 256).map { byte in
        (0 ..< 8).reduce(UInt32(byte)) { value, _ in value & 1 == 1 ? 0xEDB8_8320 ^ value >> 1 : value >> 1 }
    }
}
