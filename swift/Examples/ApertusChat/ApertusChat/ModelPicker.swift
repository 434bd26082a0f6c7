import SwiftUI

/// The models that are there, and one to fetch.
struct ModelPicker: View {
    let chat: ChatModel
    @State private var download = FolderDownload()
    @State private var address = ""
    @State private var folders: [URL] = []
    @Environment(\.dismiss) private var dismiss

    var body: some View {
        NavigationStack {
            Form {
                Section("On this device") {
                    ForEach(folders, id: \.self) { folder in
                        Button(folder.lastPathComponent) {
                            dismiss()
                            Task { await chat.load(folder) }
                        }
                    }
                    if folders.isEmpty {
                        Text("None yet").foregroundStyle(.secondary)
                    }
                }
                Section {
                    TextField("https://example.org/models/apertus-4bit/", text: $address)
                        .autocorrectionDisabled()
                    downloadRow
                } header: {
                    Text("Fetch a folder")
                } footer: {
                    Text(
                        "The address of a folder that apertus-mlx convert wrote. What has been "
                            + "fetched stays when the download is interrupted.")
                }
            }
            .navigationTitle("Models")
            .toolbar { Button("Done") { dismiss() } }
            .task { folders = ModelFolders.all() }
            .onChange(of: download.state) { folders = ModelFolders.all() }
        }
    }

    @ViewBuilder private var downloadRow: some View {
        switch download.state {
        case .idle: fetchButton
        case .running(let done, let total):
            ProgressView(value: Double(done), total: Double(max(total, 1)))
            Button("Pause", role: .cancel, action: download.pause)
        case .failed(let reason):
            Text(reason).foregroundStyle(.red)
            fetchButton
        case .done(let folder): Text("Fetched \(folder.lastPathComponent)")
        }
    }

    private var fetchButton: some View {
        Button("Fetch") {
            if let url = URL(string: address) { download.start(url) }
        }
        .disabled(URL(string: address)?.scheme != "https")
    }
}
