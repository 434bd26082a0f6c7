import Foundation

/// The tensors of a model folder by name, from the headers of its files; no arrays.
///
/// With an index, exactly the files that it names are read, and it must agree with their headers;
/// without one, all `model*.safetensors` (else the only `*.safetensors`), which must not share a
/// tensor. Variants (`model.fp16.safetensors`) beside them are left alone.
public struct WeightFiles: Sendable {
    public static let indexName = "model.safetensors.index.json"
    private static let otherFormats = [
        ".bin", ".pt", ".pth", ".pkl", ".gguf", ".npz", ".npy", ".h5", ".msgpack",
    ]

    public let folder: URL
    /// The names of the files that hold the tensors.
    public let names: [String]
    public let tensors: [String: TensorInfo]

    /// Read the headers of the files in `folder`.
    ///
    /// - Throws: `ApertusError`: no weights, another format, a damaged file, or an index that lies.
    public init(folder: URL) throws {
        self.folder = folder
        let present = try ModelFile.names(in: folder)
        let index = folder.appendingPathComponent(Self.indexName)
        var map: [String: String]?
        if ModelFile.exists(index) {
            let read = try Self.weightMap(readObject(index), index.filePath)
            let named = Set(read.values)
            names = named.sorted { $0.utf8.lexicographicallyPrecedes($1.utf8) }
            map = read
            let stray = present.first {
                $0.hasPrefix("model") && Self.isWeights($0) && !named.contains($0) && !Self.isVariant($0)
            }
            if let stray {
                throw ApertusError(
                    .rejected,
                    "\(folder.filePath): \(stray) is not named in \(Self.indexName); "
                        + "remove it or fetch the right index")
            }
        } else {
            names = try Self.unindexed(present, folder.filePath)
        }
        tensors = try Self.merged(
            names.flatMap { try SafetensorsHeader.read(folder.appendingPathComponent($0)) }, map,
            folder.filePath)
    }

    /// Where the file of a tensor lies.
    public func url(of tensor: TensorInfo) -> URL { folder.appendingPathComponent(tensor.file) }

    private static func isWeights(_ name: String) -> Bool { name.hasSuffix(".safetensors") }

    /// A variant is the same model once more, in another type or split otherwise:
    /// `model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`.
    private static func isVariant(_ name: String) -> Bool {
        guard name.hasPrefix("model."), isWeights(name), name.utf8.count > 18 else { return false }
        return name.utf8.dropFirst(6).dropLast(12).allSatisfy { byte in
            (0x30 ... 0x39).contains(byte) || (0x41 ... 0x5A).contains(byte)
                || (0x61 ... 0x7A).contains(byte) || byte == 0x5F || byte == 0x2D
        }
    }

    private static func unindexed(_ present: [String], _ folder: String) throws -> [String] {
        let all = present.filter(isWeights)
        let main = all.filter { !isVariant($0) }
        let names = main.isEmpty ? all : main
        let models = names.filter { $0.hasPrefix("model") }
        let files = models.isEmpty ? names : models
        guard let first = files.first else {
            if let other = present.first(where: { name in otherFormats.contains { name.hasSuffix($0) } }) {
                throw ApertusError(
                    .rejected,
                    "\(folder): \(other): only safetensors weights are read, never pickle, GGUF or "
                        + "NumPy files; fetch the safetensors version")
            }
            throw ApertusError(
                .rejected, "\(folder): no *.safetensors; not a model folder with weights")
        }
        if files.count > 1, !first.hasPrefix("model") || isVariant(first) {
            throw ApertusError(
                .rejected,
                "\(folder): \(files.count) *.safetensors files without \(indexName): which are the "
                    + "model's?")
        }
        return files
    }

    private static func weightMap(_ index: JSON, _ name: String) throws -> [String: String] {
        guard let members = index["weight_map"]?.members, !members.isEmpty else {
            throw ApertusError(
                .rejected, "\(name): weight_map: expected an object of tensor names")
        }
        var map: [String: String] = [:]
        for member in members {
            let key = String(decoding: member.key, as: UTF8.self)
            guard let file = member.value.text, isWeights(file), ModelFile.isPlainName(file) else {
                let shown = quoted((member.value.text ?? member.value.shown).cut(80))
                throw ApertusError(
                    .rejected,
                    "\(name): weight_map: \(quoted(key.cut(80))) points to \(shown); only plain "
                        + "*.safetensors names inside the folder are allowed")
            }
            map[key] = file
        }
        return map
    }

    private static func merged(
        _ found: [TensorInfo], _ map: [String: String]?, _ name: String
    ) throws -> [String: TensorInfo] {
        var tensors: [String: TensorInfo] = [:]
        for tensor in found {
            if let other = tensors.updateValue(tensor, forKey: tensor.name) {
                throw ApertusError(
                    .rejected,
                    "\(name): tensor \(quoted(tensor.name.cut(80))) is in both \(other.file) and "
                        + "\(tensor.file)")
            }
        }
        if let map {
            let wrong = Set(map.keys).union(tensors.keys).filter { map[$0] != tensors[$0]?.file }
            if let key = wrong.min(by: { $0.utf8.lexicographicallyPrecedes($1.utf8) }) {
                throw ApertusError(
                    .rejected,
                    "\(name): \(indexName) and the files disagree on \(wrong.count) tensors, first "
                        + "\(quoted(key.cut(80))): index \(map[key] ?? "None"), files "
                        + "\(tensors[key]?.file ?? "None")")
            }
        }
        if tensors.isEmpty {
            throw ApertusError(.rejected, "\(name): the weight files hold no tensors")
        }
        return tensors
    }
}
